// Carries out the TEMPLATE of Modelfiles with Go's own text/template, for test_ollama_template.py.
//
// JSON comes in, a list of Modelfiles each with conversations or fields; the texts go out, or the errors. What Ollama
// does around the template is written here from its documentation and what was seen of it: the value of TEMPLATE stands
// between triple quotes, characters that Go takes for unprintable are dropped, messages of one role that follow each
// other are joined, and a missing field is empty.
package main

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type asked struct {
	Modelfile string
	Messages  [][]*message
	Fields    []map[string]string
}

type told struct{ Text, Error string }

func kept(r rune) rune {
	if r == '\n' || r == '\r' || r == '\t' || strconv.IsPrint(r) {
		return r
	}
	return -1
}

func templateIn(modelfile string) string {
	_, rest, _ := strings.Cut(modelfile, `TEMPLATE """`)
	text, _, found := strings.Cut(rest, `"""`)
	if !found {
		panic("no TEMPLATE")
	}
	return strings.Map(kept, text)
}

func joined(messages []*message) ([]*message, string) {
	var out []*message
	var system []string
	for _, one := range messages {
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if len(out) > 0 && out[len(out)-1].Role == one.Role {
			out[len(out)-1].Content += "\n\n" + one.Content
		} else {
			out = append(out, &message{one.Role, one.Content})
		}
	}
	return out, strings.Join(system, "\n\n")
}

func execute(tree *template.Template, values map[string]any) told {
	var out strings.Builder
	if err := tree.Execute(&out, values); err != nil {
		return told{Error: err.Error()}
	}
	return told{Text: out.String()}
}

func main() {
	var all []asked
	if err := json.NewDecoder(os.Stdin).Decode(&all); err != nil {
		panic(err)
	}
	answers := make([][]told, len(all))
	for number, one := range all {
		tree := template.Must(template.New("").Option("missingkey=zero").Parse(templateIn(one.Modelfile)))
		for _, messages := range one.Messages {
			together, system := joined(messages)
			values := map[string]any{"Messages": together, "System": system, "Response": ""}
			answers[number] = append(answers[number], execute(tree, values))
		}
		for _, fields := range one.Fields {
			values := map[string]any{"System": fields["System"], "Prompt": fields["Prompt"], "Response": ""}
			answers[number] = append(answers[number], execute(tree, values))
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		panic(err)
	}
}
