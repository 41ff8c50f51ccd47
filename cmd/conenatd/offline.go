package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/demo"
	"github.com/conenatd/conenatd/internal/selftest"
)

func checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE",
		Short: "Check a configuration file",
		Long: `Check a configuration file. Each error has its line and its column in the file, and
a word that is nearly right gets the right one: "c.toml:2:1: lifetme: unknown key; did
you mean lifetime?". Nothing else is read or changed.`,
		Args:              exactly("FILE"),
		ValidArgsFunction: completeFile,
		RunE: func(c *cobra.Command, args []string) error {
			cfg, err := config.Load(args[0])
			switch {
			case err != nil:
				return err
			case cfg.EnablesNone():
				fmt.Fprintf(c.OutOrStdout(), "%s: good, but it enables no subnet\n", args[0])
			case cfg.Uncarried() != "":
				fmt.Fprintf(c.OutOrStdout(), "%s: good, but %s\n", args[0], cfg.Uncarried())
			default:
				fmt.Fprintf(c.OutOrStdout(), "%s: good\n", args[0])
			}
			return nil
		},
	}
}

func configCommand() *cobra.Command {
	var flags config.Flags
	var asJSON bool
	c := &cobra.Command{
		Use:   "config",
		Short: "Print the configuration that is in effect, and where each value comes from",
		Long: `Print the configuration that "conenatd run" would have with the same flags, as a
file that "conenatd run --config" takes. The comment behind each value says where it
comes from: a line of the file, a flag, or the default. A daemon that runs is not
asked.`,
		Example: "  conenatd config --config /etc/conenatd/conenatd.toml\n  conenatd config --lifetime 10m --json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			effective, err := flags.Effective()
			switch {
			case err != nil:
				return err
			case asJSON:
				return effective.WriteJSON(c.OutOrStdout())
			}
			return effective.WriteTOML(c.OutOrStdout())
		},
	}
	registerFlags(c, &flags)
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func rulesCommand() *cobra.Command {
	var flags config.Flags
	c := &cobra.Command{
		Use:   "rules",
		Short: "Print the nftables rules of a configuration",
		Long: `Print the nftables tables that "conenatd run" would have with the same flags, in
nft's syntax. Nothing is changed, and a daemon that runs is not asked.

What the rules depend on is read from this gateway: its outside links, sockets and
conntrack settings, and your own rules. Those can be read by root alone; without, comments
at the top say what is shown instead. A kernel that lacks a feature gets fewer rules, as
"conenatd status" says.`,
		Example: "  sudo conenatd rules --config /etc/conenatd/conenatd.toml",
		Args:    exactly(),
	}
	registerFlags(c, &flags)
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := flags.Resolve()
		if err != nil {
			return err
		}
		if cfg.EnablesNone() {
			return noSubnet(cfg)
		}
		text, err := daemon.Rules(cfg)
		if err != nil {
			return err
		}
		_, err = fmt.Fprint(c.OutOrStdout(), text)
		return err
	}
	return c
}

func cleanupCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cleanup",
		Short: "Take every trace of a dead daemon out of the kernel",
		Long: `Take every trace of a dead daemon of this network namespace out of the kernel,
whatever its configuration was: expectations, nftables tables, which are known by
their chain "made_by_conenatd", and flows that nobody answered.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			n, err := daemon.Cleanup()
			if running := new(control.RunningError); errors.As(err, &running) {
				return err
			}
			if err != nil && n.Expectations+n.Anchors+n.Elements+n.Children+len(n.Tables) == 0 {
				return err // what is left is not known
			}
			tables := "none"
			if len(n.Tables) > 0 {
				tables = strings.Join(n.Tables, ", ")
			}
			fmt.Fprintf(c.OutOrStdout(), "removed %s, %s, %s of the map, %s\nremoved nftables tables: %s\n", control.Several(n.Expectations, "expectation"), control.Several(n.Anchors, "anchor"),
				control.Several(n.Elements, "element"), control.Several(n.Children, "unanswered child", "unanswered children"), tables)
			return err
		},
	}
}

func selftestCommand() *cobra.Command {
	var rfc4787 bool
	c := &cobra.Command{
		Use:   "selftest",
		Short: "Prove on this kernel, in throw-away labs, what works",
		Long: `Try each behaviour with real packets in network namespaces that are made for it,
and print a line for each, with the reason where it does not work. Needs root and
the programs ip, nft and conntrack. Nothing of this machine is touched.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			exe, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find this program: %w", err)
			}
			if rfc4787 {
				return selftest.RFC4787(c.OutOrStdout(), exe)
			}
			return selftest.Run(c.OutOrStdout(), exe)
		},
	}
	c.Flags().BoolVar(&rfc4787, "rfc4787", false,
		"look how the requirements of RFC 4787 fare instead, without conenatd and with it, and those of RFC 6092 about UDP")
	return c
}

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show in a throw-away lab what conenatd does",
		Long: `Play a phone call in network namespaces that are made for it, without conenatd and
with it: a SIP device sends to its proxy's port 5060, and the proxy answers from 5070.
Needs root and the programs ip, nft and conntrack. Nothing of this machine is touched.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			return demo.Run(c.OutOrStdout())
		},
	}
}
