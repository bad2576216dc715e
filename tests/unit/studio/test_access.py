"""Who may use the studio: key, cookie, host names and origins."""

from __future__ import annotations

from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.studios import HOST, KEY, Client, run_folder

OWN = f"http://{HOST}"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    run_folder(tmp_path / "titles")
    return Client.on(tmp_path)


def test_without_the_cookie_nothing_is_told(client: Client) -> None:
    run = client.studio.found().runs[0]
    for address in ("/", "/tokens", f"/run/{run}", "/run/x/events", "/nowhere"):
        answer = client.get(address, cookie=None)
        assert answer.status == 401 and "titles" not in answer.text, address
        assert 'type="password"' in answer.text
    wrong = f"{client.access.cookie}={'x' * 43}"
    assert client.get("/", cookie=wrong).status == 401
    assert client.get("/").status == 200 and "titles" in client.get("/").text


def test_the_key_in_the_address_becomes_a_cookie_that_scripts_and_other_sites_do_not_have(
    client: Client,
) -> None:
    answer = client.get(f"/tokens?key={KEY}", cookie=None)
    assert (answer.status, answer.headers["location"]) == (303, "/tokens")
    (cookie,) = SimpleCookie(answer.headers["set-cookie"]).values()
    assert cookie.key == client.access.cookie and cookie.value == client.access.session
    assert cookie["httponly"] is True and cookie["samesite"] == "strict"
    assert KEY not in answer.headers["set-cookie"]
    for key in ("", "Sesame", "sesam", "\u00e9", "%00"):
        refused = client.get(f"/?key={quote(key)}", cookie=None)
        assert refused.status == 403 and "set-cookie" not in refused.headers


def test_the_address_behind_the_key_is_one_of_the_studio(client: Client) -> None:
    for path in ("//evil.example/", "/\\evil.example", "///evil.example"):
        location = client.get(f"{path}?key={KEY}", cookie=None).headers["location"]
        assert location[0] == "/" and location[1:].startswith(("evil.example", "%5Cevil.example"))


def test_the_form_takes_the_key(client: Client) -> None:
    kind = "application/x-www-form-urlencoded"
    answer = client.ask("POST", "/key", f"key={KEY}".encode(), cookie=None, content_type=kind)
    assert (answer.status, answer.headers["location"]) == (303, "/")
    assert client.ask("POST", "/key", b"key=no", cookie=None, content_type=kind).status == 403
    assert client.ask("POST", "/key", b"key=" + b"x" * 100_000, cookie=None, content_type=kind).status == 413
    assert client.ask("POST", "/key", b"{}", cookie=None, content_type="application/json").status == 415
    assert client.ask("POST", "/key", b"key=%ff\xff", cookie=None, content_type=kind).status == 400


def test_another_host_name_is_refused_as_in_dns_rebinding(client: Client) -> None:
    for host in (
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.",
        "[::2]",
        "",
        "[",
    ):
        assert client.get("/", host=host).status == 403, host
        assert client.get(f"/?key={KEY}", host=host, cookie=None).status == 403, host
    for host in ("localhost:8765", "[::1]:8765", "127.0.0.1"):
        assert client.get("/", host=host).status == 200, host


def test_a_studio_for_other_machines_takes_any_host_name(tmp_path: Path) -> None:
    client = Client.on(tmp_path, local_only=False)
    assert client.get("/", host="gpu-box:8765").status == 200
    answer = client.ask("POST", "/run/x/stop", host="gpu-box:8765", origin="http://gpu-box:8765")
    assert answer.status == 404
    assert client.ask("POST", "/run/x/stop", host="gpu-box:8765", origin=OWN).status == 403


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "",
        "http://evil.example",
        f"http://{HOST}.evil.example",
        "http://127.0.0.1:9999",
        f"file://{HOST}",
    ],
)
def test_a_change_that_another_page_asks_for_is_refused(client: Client, origin: str | None) -> None:
    for path in ("/key", "/run/x/stop", "/run/x/resume", "/nowhere"):
        assert client.ask("POST", path, b"key=sesame", origin=origin).status == 403


def test_a_change_of_another_site_is_refused_whatever_its_origin_says(client: Client) -> None:
    assert client.ask("POST", "/run/x/stop", sec_fetch_site="cross-site").status == 403
    assert client.ask("POST", "/run/x/stop", sec_fetch_site="same-origin").status == 404


def test_nothing_changes_by_get(client: Client) -> None:
    (folder,) = client.studio.found().runs
    from yeonma.studio.found_runs import key_of

    for action in ("stop", "resume"):
        assert client.get(f"/run/{key_of(folder)}/{action}").status == 405


def test_pages_allow_their_own_style_script_and_server_alone(client: Client) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    for header, value in {
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "referrer-policy": "same-origin",
    }.items():
        assert client.get("/").headers[header] == value
