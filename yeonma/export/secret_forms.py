"""What secrets of well-known services look like: a fixed beginning, or the service's name beside a value of its length.

The facts (beginnings, lengths, alphabets) are those of gitleaks' default rules
(https://github.com/gitleaks/gitleaks, config/gitleaks.toml, MIT), and of the services' own pages for the rest.
Every pattern has an upper bound for its length, so that trying one takes a bounded number of steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from yeonma.messages import tr


@dataclass(frozen=True)
class SecretForm:
    """A secret that can be told by itself.

    anchor: bytes that stand in every such secret, searched for literally. pattern: the whole secret, tried where the
    anchor was found, `before` bytes earlier. weak: whether ordinary text may have this form too, so that it counts
    only if it also looks random. has_blanks: whether blanks or quotes may stand in it.
    """

    name: str
    anchor: bytes
    pattern: re.Pattern[bytes]
    before: int = 0
    weak: bool = False
    has_blanks: bool = False


_END = "(?![A-Za-z0-9_])"


def _start(anchor: str) -> str:
    """What may not stand before. Base64 and names of other things may contain a short anchor without punctuation."""
    is_distinct = len(anchor) >= 4 and not anchor.isalnum()
    return "(?<![A-Za-z0-9])" if is_distinct else "(?<![A-Za-z0-9_+/-])"


def _forms(name: str, *shapes: tuple[str, str], weak: bool = False) -> tuple[SecretForm, ...]:
    """Forms that begin with a literal, each given as the literal and a pattern of the rest."""
    return tuple(
        SecretForm(
            name,
            anchor.encode(),
            re.compile(f"{_start(anchor)}{re.escape(anchor)}{rest}{_END}".encode()),
            weak=weak,
        )
        for anchor, rest in shapes
    )


def _inner(
    name: str, anchor: str, before: int, pattern: str, *, has_blanks: bool = False
) -> tuple[SecretForm, ...]:
    """A form whose literal stands within it, after exactly `before` characters."""
    return (SecretForm(name, anchor.encode(), re.compile(pattern.encode()), before, has_blanks=has_blanks),)


_UUID = "[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"

FORMS: tuple[SecretForm, ...] = (
    # clouds
    *_forms(
        tr("an AWS access key"), *((start, "[A-Z0-9]{16}") for start in ("AKIA", "ASIA", "ABIA", "ACCA"))
    ),
    *_forms(tr("an AWS access key"), ("A3T", "[A-Z0-9]{17}")),
    *_forms(tr("an Amazon Bedrock key"), ("ABSK", "[A-Za-z0-9+/]{109,269}={0,2}")),
    *_forms(tr("an Amazon Bedrock key"), ("bedrock-api-key-", "[A-Za-z0-9+/=]{20,2000}")),
    *_forms(tr("an Alibaba access key"), ("LTAI", "[A-Za-z0-9]{20}")),
    *_inner(tr("an Azure client secret"), "Q~", 4, r"[\w~.]{3}[0-9]Q~[\w~.-]{31,34}(?![\w~.-])"),
    *_forms(tr("an Azure storage key"), ("AccountKey=", "[A-Za-z0-9+/]{86}==")),
    *_forms(tr("a Google API key"), ("AIza", r"[\w-]{35}")),
    *_forms(tr("a Google token"), ("GOCSPX-", r"[\w-]{28}"), ("ya29.", r"[\w-]{50,400}")),
    *_forms(tr("a Cloudflare origin key"), ("v1.0-", "[a-f0-9]{24}-[a-f0-9]{146}")),
    *_forms(tr("a DigitalOcean token"), *((f"do{kind}_v1_", "[a-f0-9]{64}") for kind in "opr")),
    *_forms(tr("a Fly.io token"), ("fo1_", r"[\w-]{43}")),
    *_forms(
        tr("a Fly.io token"), *((f"fm{kind}_", "[A-Za-z0-9+/]{100,1000}={0,3}") for kind in ("1a", "1r", "2"))
    ),
    *_forms(tr("a Heroku key"), ("HRKU-AA", r"[\w-]{58}")),
    *_forms(tr("a Scalingo token"), ("tk-us-", r"[\w-]{48}")),
    *_forms(tr("a Yandex key"), ("AQVN", r"[\w-]{35,38}")),
    *_forms(tr("a Yandex token"), ("t1.", r"[\w-]{1,200}={0,2}\.[\w-]{86}={0,2}")),
    # models and data
    *_forms(tr("a Hugging Face token"), ("hf_", "[A-Za-z0-9]{30,60}"), ("api_org_", "[A-Za-z]{30,60}")),
    *_forms(tr("an Anthropic key"), ("sk-ant-", r"[a-z0-9]{3,12}-[\w-]{80,120}")),
    *_forms(
        tr("an OpenAI key"), *((f"sk-{kind}-", r"[\w-]{40,200}") for kind in ("proj", "svcacct", "admin"))
    ),
    *_forms(tr("an API key (sk-)"), ("sk-", r"[\w-]{20,200}"), weak=True),
    *_forms(tr("a Groq key"), ("gsk_", "[A-Za-z0-9]{40,60}")),
    *_forms(tr("an NVIDIA key"), ("nvapi-", r"[\w-]{50,80}")),
    *_forms(tr("a Perplexity key"), ("pplx-", "[A-Za-z0-9]{40,60}")),
    *_forms(tr("a Pinecone key"), ("pcsk_", r"\w{50,100}")),
    *_forms(tr("a Replicate token"), ("r8_", "[A-Za-z0-9]{37}")),
    *_forms(tr("an xAI key"), ("xai-", "[A-Za-z0-9]{60,90}")),
    *_forms(
        tr("a LangSmith key"), *((f"lsv2_{kind}_", "[a-f0-9]{32}_[a-f0-9]{10}") for kind in ("pt", "sk"))
    ),
    *_forms(tr("a Databricks token"), ("dapi", "[a-f0-9]{32}(?:-[0-9])?")),
    *_forms(tr("a ClickHouse key"), ("4b1d", "[A-Za-z0-9]{38}")),
    *_forms(tr("a Prefect token"), ("pnu_", "[A-Za-z0-9]{36}")),
    # code, packages, builds
    *_forms(tr("a GitHub token"), *((f"gh{kind}_", "[A-Za-z0-9]{36,255}") for kind in "opurs")),
    *_forms(tr("a GitHub token"), ("github_pat_", r"\w{50,255}")),
    *_forms(
        tr("a GitLab token"),
        *(
            (f"gl{kind}-", r"[\w-]{20,300}(?:\.[\w.-]{9,20})?")
            for kind in ("pat", "dt", "ft", "rt", "ffct", "imt")
        ),
        *((f"gl{kind}-", r"[\w-]{20,80}") for kind in ("agent", "oas", "ptt", "soat", "cbt")),
        ("GR1348941", r"[\w-]{20}"),
        ("_gitlab_session=", "[0-9a-z]{32}"),
    ),
    *_forms(tr("a Docker token"), ("dckr_pat_", r"[\w-]{27}"), ("dckr_oat_", r"[\w-]{32}")),
    *_forms(tr("an npm token"), ("npm_", "[A-Za-z0-9]{36}")),
    *_forms(tr("a PyPI token"), ("pypi-AgE", r"[\w-]{50,1000}")),
    *_forms(tr("a RubyGems token"), ("rubygems_", "[a-f0-9]{48}")),
    *_forms(tr("a Clojars token"), *((start, "[A-Za-z0-9]{60}") for start in ("CLOJARS_", "clojars_"))),
    *_forms(tr("an Artifactory key"), ("AKCp", "[A-Za-z0-9]{69}"), ("cmVmd", "[A-Za-z0-9]{59}")),
    *_forms(tr("a Postman key"), ("PMAK-", "[A-Fa-f0-9]{24}-[A-Fa-f0-9]{34}")),
    *_forms(tr("a Pulumi token"), ("pul-", "[a-f0-9]{40}")),
    *_forms(tr("an Octopus Deploy key"), ("API-", "[A-Z0-9]{26}")),
    *_forms(tr("an OpenShift token"), ("sha256~", r"[\w-]{43}")),
    *_forms(
        tr("a Harness key"),
        *((start, r"[\w-]{22}\.[A-Za-z0-9]{24}\.[A-Za-z0-9]{20}") for start in ("pat.", "sat.")),
    ),
    *_inner(tr("a Terraform token"), ".atlasv1.", 14, r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,70}"),
    *_forms(tr("an Infracost key"), ("ico-", "[A-Za-z0-9]{32}")),
    *_forms(tr("a Sourcegraph token"), ("sgp_", "(?:(?:[a-fA-F0-9]{16}|local)_)?[a-fA-F0-9]{40}")),
    *_forms(tr("a Readme key"), ("rdme_", "[a-z0-9]{70}")),
    *_forms(tr("a SettleMint token"), *((f"sm_{kind}at_", "[A-Za-z0-9]{16}") for kind in "aps")),
    *_forms(tr("a Defined Networking token"), ("dnkey-", r"[\w=-]{26}-[\w=-]{52}")),
    *_forms(tr("a Tailscale key"), ("tskey-", r"[a-z]{2,10}-[A-Za-z0-9]{8,20}-[A-Za-z0-9]{20,40}")),
    # vaults and keys
    *_forms(
        tr("a 1Password secret key"),
        ("A3-", "[A-Z0-9]{6}-(?:[A-Z0-9]{11}|[A-Z0-9]{6}-[A-Z0-9]{5})(?:-[A-Z0-9]{5}){3}"),
    ),
    *_forms(tr("a 1Password token"), ("ops_eyJ", "[A-Za-z0-9+/]{250,4000}={0,3}")),
    *_forms(tr("an age key"), ("AGE-SECRET-KEY-1", "[QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L]{58}")),
    *_forms(
        tr("a Doppler token"),
        *((f"dp.{kind}.", "[A-Za-z0-9]{40,44}") for kind in ("pt", "ct", "sa", "scim", "audit")),
    ),
    *_forms(tr("a Vault token"), ("hvs.", r"[\w-]{24,200}"), ("hvb.", r"[\w-]{138,300}")),
    *_forms(tr("a Vault token"), ("s.", "[A-Za-z0-9]{24}"), weak=True),
    *_forms(
        tr("an Authress key"),
        *(
            (f"{start}_", r"[a-z0-9]{5,30}\.[a-z0-9]{4,6}\.acc[_-][a-z0-9-]{10,32}\.[a-z0-9+/_=-]{30,120}")
            for start in ("sc", "ext", "scauth", "authress")
        ),
    ),
    # chat and mail
    *_forms(tr("a Slack token"), *((f"xox{kind}-", r"[A-Za-z0-9-]{8,200}") for kind in "abeoprs")),
    *_forms(tr("a Slack token"), ("xapp-", "[0-9]-[A-Za-z0-9]{1,40}-[0-9]{1,40}-[A-Za-z0-9]{1,200}")),
    *_forms(tr("a Slack token"), ("xoxe.xox", "[bp]-[0-9]-[A-Za-z0-9]{100,200}")),
    *_forms(
        tr("a Slack webhook"), ("hooks.slack.com/", "(?:services|workflows|triggers)/[A-Za-z0-9+/]{40,60}")
    ),
    *_inner(
        tr("a Teams webhook"),
        ".webhook.office.com/webhookb2/",
        0,
        r"\.webhook\.office\.com/webhookb2/[a-z0-9@-]{70,80}/IncomingWebhook/[a-z0-9]{32}/[a-z0-9-]{36}",
    ),
    *_inner(tr("a Discord webhook"), "/api/webhooks/", 0, r"/api/webhooks/[0-9]{17,20}/[\w-]{60,80}"),
    *_inner(tr("a Telegram bot token"), ":A", 5, r"[0-9]{5}:A[\w-]{34}(?![\w-])"),
    *_forms(tr("a SendGrid key"), ("SG.", r"[\w=.-]{66}")),
    *_forms(tr("a Sendinblue key"), ("xkeysib-", "[a-f0-9]{64}-[A-Za-z0-9]{16}")),
    *_forms(tr("a Twilio key"), ("SK", "[0-9a-fA-F]{32}")),
    # money
    *_forms(
        tr("a Stripe key"),
        *(
            (f"{kind}_{mode}_", "[A-Za-z0-9]{10,120}")
            for kind in ("sk", "rk")
            for mode in ("test", "live", "prod")
        ),
    ),
    *_forms(tr("a Square token"), ("sq0atp-", r"[\w-]{22,60}")),
    *_forms(tr("a Square token"), ("EAAA", r"[\w-]{22,60}"), weak=True),
    *_forms(
        tr("a Flutterwave key"),
        ("FLWSECK_TEST-", "[A-Ha-h0-9]{12,32}(?:-X)?"),
        ("FLWPUBK_TEST-", "[A-Ha-h0-9]{32}-X"),
    ),
    *_forms(
        tr("a Plaid token"),
        *((f"access-{mode}-", _UUID) for mode in ("sandbox", "development", "production")),
    ),
    *_forms(
        tr("a Lob key"),
        *(
            (f"{mode}_{pub}", f"[a-f0-9]{{{length}}}")
            for mode in ("live", "test")
            for pub, length in (("", 35), ("pub_", 31))
        ),
    ),
    *_forms(tr("a Duffel token"), *((f"duffel_{mode}_", r"[\w=-]{43}") for mode in ("test", "live"))),
    *_forms(
        tr("a Shopify token"), *((f"shp{kind}_", "[A-Fa-f0-9]{32}") for kind in ("at", "ca", "pa", "ss"))
    ),
    *_forms(tr("a Shippo token"), *((f"shippo_{mode}_", "[A-Fa-f0-9]{40}") for mode in ("live", "test"))),
    *_forms(tr("an EasyPost key"), *((start, "[A-Za-z0-9]{54}") for start in ("EZAK", "EZTK"))),
    # monitoring and the rest
    *_forms(tr("an Adobe secret"), ("p8e-", "[A-Za-z0-9]{32}")),
    *_forms(tr("an Airtable token"), ("pat", r"[A-Za-z0-9]{14}\.[a-f0-9]{64}")),
    *_forms(tr("an Atlassian token"), ("ATATT3", r"[\w=-]{186}")),
    *_forms(tr("a Dropbox token"), ("sl.", r"[\w=-]{120,200}")),
    *_forms(tr("a Dynatrace token"), ("dt0c01.", r"[A-Za-z0-9]{24}\.[A-Za-z0-9]{64}")),
    *_inner(tr("a Facebook token"), "|", 15, r"[0-9]{15}\|[\w-]{27,40}(?![\w-])"),
    *_inner(tr("a Facebook token"), "%", 15, r"[0-9]{15}%[\w-]{27,40}(?![\w-])"),
    *_forms(tr("a Facebook token"), ("EAAM", "[A-Za-z0-9]{100,300}"), ("EAAC", "[A-Za-z0-9]{100,300}")),
    *_forms(tr("a Frame.io token"), ("fio-u-", r"[\w=-]{64}")),
    *_forms(tr("a Grafana token"), ("eyJrIjoi", "[A-Za-z0-9]{70,400}={0,3}")),
    *_forms(
        tr("a Grafana token"),
        ("glc_", "[A-Za-z0-9+/]{32,400}={0,3}"),
        ("glsa_", "[A-Za-z0-9]{32}_[A-Fa-f0-9]{8}"),
    ),
    *_forms(tr("a secret of 42's API"), *((f"s-s4t2{kind}-", "[a-f0-9]{64}") for kind in ("ud", "af"))),
    *_forms(tr("a Linear key"), ("lin_api_", "[A-Za-z0-9]{40}"), ("lin_oauth_", "[A-Za-z0-9]{40,64}")),
    *_forms(
        tr("a Mapbox token"),
        ("pk.", r"[A-Za-z0-9]{60}\.[A-Za-z0-9]{22}"),
        ("sk.", r"[A-Za-z0-9]{60,100}\.[A-Za-z0-9]{22}"),
    ),
    *_inner(tr("a MaxMind key"), "_mmk", 36, r"(?<!\w)[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk(?!\w)"),
    *_forms(
        tr("a New Relic key"),
        ("NRJS-", "[a-f0-9]{19}"),
        ("NRII-", "[A-Za-z0-9-]{32}"),
        ("NRAK-", "[A-Za-z0-9]{27}"),
    ),
    *_forms(tr("a Notion token"), ("ntn_", "[0-9]{11}[A-Za-z0-9]{35}")),
    *_forms(
        tr("a PlanetScale secret"),
        *((f"pscale_{kind}_", r"[\w=.-]{32,64}") for kind in ("tkn", "oauth", "pw")),
    ),
    *_forms(tr("a Sentry token"), ("sntrys_", "[A-Za-z0-9+/=_]{60,600}"), ("sntryu_", "[a-f0-9]{64}")),
    *_forms(tr("a SonarQube token"), *((f"sq{kind}_", r"[\w=-]{40}") for kind in "upa")),
    *_forms(tr("a Typeform token"), ("tfp_", r"[\w=.-]{59}")),
    *_inner(tr("a Sidekiq key"), "@gems.contribsys.com", 17, r"[a-f0-9]{8}:[a-f0-9]{8}@"),
    *_inner(tr("a Sidekiq key"), "@enterprise.contribsys.com", 17, r"[a-f0-9]{8}:[a-f0-9]{8}@"),
    *_inner(
        tr("a Sidekiq key"),
        "CONTRIBSYS__COM",
        0,
        r"CONTRIBSYS__COM[\"'\s=:>]{1,9}[a-f0-9]{8}:[a-f0-9]{8}(?!\w)",
        has_blanks=True,
    ),
    *_inner(
        tr("a password of NuGet"), 'Password"', 0, r'Password"\s{0,9}value="[^"\r\n]{8,200}"', has_blanks=True
    ),
    # of no single service
    *_forms(tr("a JSON web token"), ("ZXlK", "[A-Za-z0-9+/_-]{44,4000}")),
    SecretForm(
        tr("a JSON web token"),
        b"ey",
        re.compile(
            rb"(?<![\w-])ey[A-Za-z0-9_-]{15,4000}\.ey[A-Za-z0-9/\\_-]{15,8000}\.[A-Za-z0-9/\\_=-]{0,8000}"
        ),
    ),
)
"""Forms by the literal in them."""


def _lengths(text: str) -> dict[str, frozenset[int]]:
    """Reads lines of names and the lengths that follow them, each a number or a range such as `40-46`."""
    table: dict[str, frozenset[int]] = {}
    for line in text.split("\n"):
        lengths: set[int] = set()
        names = []
        for word in line.split():
            first, _, last = word.partition("-")
            if first.isdigit():
                lengths |= set(range(int(first), int(last or first) + 1))
            else:
                names.append(word)
        table |= dict.fromkeys(names, frozenset(lengths))
    return table


KEYED = _lengths(
    """
    adafruit adobe algolia bittrex codecov droneci fastly flickr nytimes newyorktimes privateai linear 32
    airtable 17
    alibaba twitch 30
    asana 16 32
    atlassian confluence jira etsy 24
    beamer 46
    bitbucket 32 64
    cloudflare 37 40
    cohere datadog gitter launchdarkly meraki sendbird wandb zendesk 36 40
    sonar sonarqube 40 44
    coinbase freshbooks sentry 64
    confluent 16 64
    contentful 43
    discord 18 32 64
    dropbox 15 64 138
    facebook 32
    finicity 20 32
    finnhub 20
    gocardless 45
    heroku hubspot messagebird snyk squarespace 25 36
    intercom 60
    jfrog artifactory bintray xray 64 73
    kraken 80-90
    kucoin 24 36
    linkedin 14 16
    looker 20 24
    mailchimp mailchimpsdk 37
    mailgun 36 39 50
    mattermost 26
    netlify 40-46
    newrelic 64
    okta 42
    plaid 24 30
    rapidapi 50
    sourcegraph 40
    sumo sumologic 14 64
    travis travisci 22
    twitter 25 36-66 102-122
    yandex 40
    """
)
"""Services whose secrets look like nothing of their own: the name beside the value -> the value's lengths."""
