package reference

import (
	"fmt"
	"strings"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/text"
)

// Markdown returns docs/configuration.md.
func Markdown() []byte {
	var b strings.Builder
	b.WriteString(`# Configuration

<!-- "make generate" writes this file from internal/config. -->

The configuration is a TOML file, such as /etc/conenatd/conenatd.toml. Each key outside
` + "`[[subnet]]`" + ` tables is also a flag of ` + "`conenatd run`" + `, and a flag overrides the file. ` + "`conenatd check FILE`" + `
says what is wrong with a file, with line and column. ` + "`conenatd config`" + ` prints the configuration in
effect, and where each value comes from. After a change, ` + "`conenatd reload`" + ` suffices, except for
the keys that need a restart.

[conenatd.schema.json](../deploy/conenatd.schema.json) lets an editor complete and check the file,
and [conenatd.toml](../deploy/conenatd.toml) has every key with its default.
`)
	b.WriteString(entries(func(title string) string { return "## " + title }))
	return []byte(b.String())
}

// entries has all keys, under the headings of their sections.
func entries(heading func(title string) string) string {
	var b strings.Builder
	for _, s := range config.Sections() {
		fmt.Fprintf(&b, "\n%s\n", heading(s.Title))
		for _, k := range s.Keys {
			b.WriteString(entry(k))
		}
	}
	fmt.Fprintf(&b, "\n%s\n\n%s\n", heading("Subnets"), wrap(subnetsIntro, ""))
	for _, k := range config.SubnetKeys() {
		b.WriteString(entry(k))
	}
	return b.String()
}

const subnetsIntro = `Each [[subnet]] table enables one inside prefix. The tables stand after all other keys. ` +
	`Without any, nothing is enabled. Of the flags, --routed, --filtering and --mapping are for all prefixes of --subnet.`

// entry is a key as Markdown.
func entry(k config.Key) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", k.Name, wrap(k.Doc, ""))
	fmt.Fprintf(&b, "- Type: %s\n", kindText(k))
	if values := valuesText(k); values != "" {
		fmt.Fprintf(&b, "- Values: %s\n", values)
	}
	if k.Name == "prefix" {
		b.WriteString("- Default: none, the key is required\n")
	} else {
		fmt.Fprintf(&b, "- Default: `%s`\n", k.Default)
	}
	if k.Flag != "" {
		fmt.Fprintf(&b, "- Flag: `--%s`\n", k.Flag)
	}
	if k.Restart {
		b.WriteString("- A change needs a restart.\n")
	}
	return b.String()
}

// kinds has the types of values as people call them.
var kinds = map[string]string{
	"word": "string", "name": "string, the name of a table", "duration": `string, a duration such as "90s"`, "bool": "boolean", "number": "integer",
	"bytes": "integer, in bytes", "bits": "integer, bits side by side", "link": "string, the name of a link", "prefix": `string, a prefix such as "192.0.2.0/24"`,
	"port":  `integer, or string with a range such as "10000-20000"`,
	"ports": `integer, string with a range such as "10000-20000", or an array of these`,
	"path":  "string, an absolute path", "endpoint": "string, an address and a port",
}

func kindText(k config.Key) string {
	if k.List && k.Kind != "ports" {
		return "array; each item: " + kinds[k.Kind]
	}
	return kinds[k.Kind]
}

// valuesText says which values are accepted.
func valuesText(k config.Key) string {
	var all []string
	for _, w := range k.Words {
		all = append(all, "`"+config.Literal(w)+"`")
	}
	switch {
	case k.Max > 0:
		all = append(all, fmt.Sprintf("%d to %d", k.Min, k.Max))
	case k.Range != "":
		all = append(all, k.Range)
	}
	return strings.Join(all, ", ")
}

// wrap breaks prose into lines of at most 92 characters, if words permit, with a prefix for
// each.
func wrap(prose, prefix string) string {
	return strings.TrimSuffix(text.WrapAt(92, prose, prefix), "\n")
}
