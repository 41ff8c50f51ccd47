package main

import (
	"net"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
)

// registerFlags adds the flags of "run", and completes their values.
func registerFlags(c *cobra.Command, flags *config.Flags) {
	flags.Register(c.Flags())
	complete(c, "config", completeFile)
	keys := config.SubnetKeys()
	for _, s := range config.Sections() {
		keys = append(keys, s.Keys...)
	}
	for _, k := range keys {
		switch {
		case k.Flag == "":
		case k.Flag == "control-socket":
			complete(c, k.Flag, completeSocket)
		case k.Flag == "subnet":
			complete(c, k.Flag, completeLink("auto"))
		case k.Kind == "link":
			complete(c, k.Flag, completeLink())
		case k.Kind == "path":
			complete(c, k.Flag, completeAnyFile)
		case k.Kind == "bool":
			complete(c, k.Flag, completeWords("true", "false"))
		default:
			complete(c, k.Flag, completeWords(k.Words...))
		}
	}
}

// complete sets what completes the value of a flag that c has.
func complete(c *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := c.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err) // there is no such flag, or it has one already
	}
}

// completeWords offers words, and no files.
func completeWords(words ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
}

// completeFile offers configuration files.
func completeFile(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return []string{"toml"}, cobra.ShellCompDirectiveFilterFileExt
}

// completeAnyFile offers all files. The default of the program is to offer none.
func completeAnyFile(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// completeSocket offers the sockets of the daemons of this machine. Any path may follow.
func completeSocket(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	one, err := control.DefaultSocket()
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	all, _ := filepath.Glob(filepath.Join(filepath.Dir(one), "*.sock")) // the pattern is right
	return all, cobra.ShellCompDirectiveDefault
}

// completeLink offers words and the links of this network namespace, except for loopback.
func completeLink(words ...string) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		all := slices.Clone(words)
		links, _ := net.Interfaces() // without them there are fewer words
		for _, l := range links {
			if l.Flags&net.FlagLoopback == 0 {
				all = append(all, l.Name)
			}
		}
		return all, cobra.ShellCompDirectiveNoFileComp
	}
}
