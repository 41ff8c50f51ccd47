package reference

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/conenatd/conenatd/internal/config"
)

// FilePage returns the manual page conenatd.toml(5).
func FilePage() []byte {
	var b strings.Builder
	b.WriteString(`conenatd.toml 5 "" "conenatd" "File Formats Manual"
===

# NAME

conenatd.toml - configuration of conenatd

# DESCRIPTION

`)
	b.WriteString(wrap(`The configuration of **conenatd**(8) is a TOML file, normally /etc/conenatd/conenatd.toml. `+
		`Each key outside [[subnet]] tables is also a flag of "conenatd run", and a flag overrides the file. `+
		`"conenatd check FILE" says what is wrong with a file, with line and column. "conenatd config" prints the `+
		`configuration in effect, and where each value comes from. After a change, "conenatd reload" suffices, except for the keys that need a restart.`, "") + "\n")
	b.WriteString(entries(func(title string) string { return "# " + strings.ToUpper(title) }))
	b.WriteString(`
# EXAMPLE

    lifetime = "10m"

    [[subnet]]
    prefix = "192.168.1.0/24"

# SEE ALSO

**conenatd**(8)
`)
	return roff(b.String())
}

// CommandPage returns the manual page conenatd(8) of the program with this root command.
func CommandPage(root *cobra.Command) []byte {
	var b strings.Builder
	b.WriteString(`conenatd 8 "" "conenatd" "System Manager's Manual"
===

# NAME

conenatd - restricted cone NAT for UDP on a Linux gateway

# SYNOPSIS

**conenatd** *command* [*flags*]

# DESCRIPTION

`)
	b.WriteString(wrap(`Once an inside host has sent a UDP packet to an outside address, that address may answer from any port, and `+
		`no other address may (RFC 4787: endpoint-independent mapping with address-dependent filtering). **conenatd** works beside the `+
		`NAT and firewall rules of the gateway, and changes none of them.`, "") + "\n\n# COMMANDS\n")
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		text := c.Long
		if text == "" {
			text = c.Short + "."
		}
		fmt.Fprintf(&b, "\n### conenatd %s\n\n%s\n", escape(c.Use), escape(text))
		b.WriteString(flags(c.LocalNonPersistentFlags()))
		if c.Example != "" {
			b.WriteString("\nExamples:\n\n")
			for line := range strings.Lines(c.Example) {
				b.WriteString("    " + strings.TrimSpace(line) + "\n")
			}
		}
	}
	b.WriteString(`
### conenatd completion bash|zsh|fish

Print the script that lets a shell complete commands, flags and their values.

# ENVIRONMENT

NO_COLOR
: If it is not empty, nothing is coloured (no-color.org). Only "doctor", "probe" and "top" colour, and only on a terminal.

# EXIT STATUS

` + wrap(`0 without errors; 78 if the configuration or the command line is wrong, so that trying again cannot help; 1 for other errors. `+
		`"conenatd doctor" and "conenatd probe" have some more.`, "") + `

# FILES

/etc/conenatd/conenatd.toml
: The configuration.

/run/conenatd
: Control sockets, and notes for the next daemon.

# SEE ALSO

**conenatd.toml**(5), **nft**(8), **conntrack**(8)
`)
	return roff(b.String())
}

// flags lists the flags of a command. Those of "run" that other commands have as well are
// described once, by conenatd.toml(5).
func flags(fs *pflag.FlagSet) string {
	known := make(map[string]bool)
	for _, s := range config.Sections() {
		for _, k := range s.Keys {
			known[k.Flag] = true
		}
	}
	var b strings.Builder
	keys := 0
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		if known[f.Name] && fs.Lookup("config") != nil {
			keys++
			return
		}
		name, usage := pflag.UnquoteUsage(f)
		if name != "" {
			name = " *" + name + "*"
		}
		fmt.Fprintf(&b, "\n**--%s**%s\n: %s\n", f.Name, name, escape(strings.ReplaceAll(usage, "\n", " ")))
	})
	if keys > 0 {
		fmt.Fprintf(&b, "\nEach key of **conenatd.toml**(5) is a flag, too: with dashes, and in the singular if it may be repeated.\n")
	}
	return b.String()
}

// special are the characters that Markdown could take for its own.
var special = regexp.MustCompile("[][*_<>|]")

func escape(text string) string { return special.ReplaceAllString(text, `\$0`) }

// roff converts Markdown as md2man knows it into a manual page.
func roff(markdown string) []byte { return md2man.Render([]byte(markdown)) }
