package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/doctor"
)

// clientCommand returns a command that talks to the running daemon, with the flags that all
// such commands have.
func clientCommand(use, short string, args cobra.PositionalArgs,
	ask func(c *cobra.Command, client *control.Client, args []string) error,
) *cobra.Command {
	var dial func() (*control.Client, error)
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  args,
		RunE: func(c *cobra.Command, args []string) error {
			client, err := dial()
			if err == nil {
				err = ask(c, client, args)
			}
			if !c.Flags().Changed("control-socket") {
				err = notRunning(err)
			}
			return err
		},
	}
	dial = socketFlag(c)
	return c
}

// socketFlag adds the flag of the control socket to a command. dial returns a client for the
// socket that the flag names, or otherwise for that of the daemon that runs now.
func socketFlag(c *cobra.Command) (dial func() (*control.Client, error)) {
	var socket string
	c.Flags().StringVar(&socket, "control-socket", "", "control socket of the daemon (default: that of the daemon in this network namespace)")
	complete(c, "control-socket", completeSocket)
	return func() (*control.Client, error) {
		if socket != "" {
			return control.Dial(socket), nil
		}
		path, err := control.Find()
		if err != nil {
			return nil, err
		}
		return control.Dial(path), nil
	}
}

// showCommand is a clientCommand that prints the daemon's state.
func showCommand(use, short string, show func(c *cobra.Command, client *control.Client, asJSON bool) error) *cobra.Command {
	var asJSON bool
	c := clientCommand(use, short, exactly(), func(c *cobra.Command, client *control.Client, _ []string) error {
		return show(c, client, asJSON)
	})
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func reloadCommand() *cobra.Command {
	c := clientCommand("reload", "Let the daemon read its configuration again", exactly(),
		func(c *cobra.Command, client *control.Client, _ []string) error { return client.Reload(c.Context()) })
	c.Long = `Let the daemon read its configuration file again, as SIGHUP does; flags override
the file. Permissions that it still allows are not touched. Nothing is printed if it
was read. Of a file with an error, or with another value of a key that needs a
restart, nothing takes effect, and this says why.`
	return c
}

// stopTime is how long a stop may take; systemd waits as long.
const stopTime = 90 * time.Second

func stopCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Stop the daemon, as SIGTERM does, and wait for its end",
		Long: `Stop the daemon of this network namespace, as SIGTERM does, and wait for its end.
The setting "on_stop" decides what becomes of the permissions. systemd does not
start the daemon again. A daemon of another root directory, such as that of a
container or of the machine around a chroot, is left alone.`,
		Args: exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			pid, err := control.Stop(stopTime)
			switch {
			case err != nil:
				return err
			case pid == 0:
				fmt.Fprintln(c.OutOrStdout(), "no conenatd runs in this network namespace")
			default:
				fmt.Fprintf(c.OutOrStdout(), "stopped conenatd (pid %d)\n", pid)
			}
			return nil
		},
	}
}

func revokeCommand() *cobra.Command {
	var words []control.Word
	c := clientCommand("revoke WORD...", "End permissions", exactly("WORD..."),
		func(c *cobra.Command, client *control.Client, _ []string) error {
			n, err := client.Revoke(c.Context(), words)
			return revoked(c, n, err)
		})
	c.PreRunE = func(_ *cobra.Command, args []string) error {
		for _, arg := range args {
			word, err := control.ParseWord(arg)
			if err != nil {
				return &config.UsageError{Err: err}
			}
			words = append(words, word)
		}
		return nil
	}
	c.Long = `End the permissions that match every word. A word is an address (of an inside
host, of the outside, of a peer), a prefix of such addresses, or an endpoint (inside
or outside). A permission for several peers ends with each of them. Existing flows
continue, and so do children that were answered, but they do not bring a permission
back; a new flow does. That holds across a restart, too, for up to two hours between
the daemons, but not after a crash where the kernel has no nftables. Another host
that waited for one of them gets its own.`
	c.Example = "  conenatd revoke 192.168.1.20\n  conenatd revoke 198.51.100.1:5060 203.0.113.5"
	return c
}

func flushCommand() *cobra.Command {
	c := clientCommand("flush", "End all permissions", exactly(),
		func(c *cobra.Command, client *control.Client, _ []string) error {
			n, err := client.Flush(c.Context())
			return revoked(c, n, err)
		})
	c.Long = `End all permissions, as "conenatd revoke" ends some. Existing flows continue, but
do not bring their permissions back, however long they last and also across a
restart: a new flow does.`
	return c
}

// revoked prints how many permissions ended.
func revoked(c *cobra.Command, n int, err error) error {
	switch {
	case err != nil:
	case n == 0:
		fmt.Fprintln(c.OutOrStdout(), "revoked 0 permissions")
	default:
		fmt.Fprintf(c.OutOrStdout(), "revoked %s; existing flows continue without it, and a new flow brings it back\n", control.Several(n, "permission"))
	}
	return err
}

func listCommand() *cobra.Command {
	var filter control.Filter
	var asCSV bool
	c := showCommand("list", "List the permissions", func(c *cobra.Command, client *control.Client, asJSON bool) error {
		each := func(f func(control.Permission) error) error {
			return client.Permissions(c.Context(), func(p control.Permission) error {
				if !filter.Selects(&p) {
					return nil
				}
				return f(p)
			})
		}
		switch {
		case asJSON && asCSV:
			return &config.UsageError{Err: errors.New("--csv: expected without --json")}
		case asJSON:
			enc := json.NewEncoder(c.OutOrStdout())
			return each(func(p control.Permission) error { return enc.Encode(p) })
		case asCSV:
			w := control.NewCSVWriter(c.OutOrStdout())
			return errors.Join(each(w.Write), w.Close())
		}
		w, empty := control.NewTableWriter(c.OutOrStdout(), time.Now()), true
		err := each(func(p control.Permission) error {
			empty = false
			return w.Write(p)
		})
		if err != nil {
			return err
		}
		if err := w.Close(); err != nil || !empty {
			return err
		}
		return noteUnserved(c, client, &filter)
	})
	c.Long = `List the permissions: who may send to whom, and why a permission is inactive. With
several of the flags --host, --peer, --subnet and --state, list those that match
each of them. Of more than 10,000 only the first 10,000 are sorted: pipe them
through sort.`
	c.Example = "  conenatd list --host 192.168.1.20 --state refused\n  conenatd list --peer 203.0.113.5 --csv"
	fs := c.Flags()
	fs.BoolVar(&asCSV, "csv", false, "print comma-separated values, after a line with the names of the columns")
	filterFlags(fs, &filter)
	stateFlag(c, &filter)
	return c
}

// noteUnserved says why the list of what filter selects is empty, if that is no enabled subnet.
func noteUnserved(c *cobra.Command, client *control.Client, filter *control.Filter) error {
	st, err := client.Status(c.Context())
	if text := filter.Unserved(st.Subnets); err == nil && text != "" {
		fmt.Fprintln(c.ErrOrStderr(), text)
	}
	return err
}

// filterFlags adds the flags of a filter, except the state.
func filterFlags(fs *pflag.FlagSet, filter *control.Filter) {
	fs.Func("host", "only those of this inside `address`, or of a prefix", filter.SetHost)
	fs.Func("peer", "only those that admit this `address`, or an address of a prefix", filter.SetPeer)
	fs.Func("subnet", "only those of hosts in this `prefix`", filter.SetSubnet)
}

// stateFlag adds the flag of the state to a command.
func stateFlag(c *cobra.Command, filter *control.Filter) {
	c.Flags().Func("state", "only those in this `state`: standing, refused or waiting", filter.SetState)
	complete(c, "state", completeWords("standing", "refused", "waiting"))
}

func watchCommand() *cobra.Command {
	var filter control.Filter
	c := showCommand("watch", "Show permissions and children as they come and go", func(c *cobra.Command, client *control.Client, asJSON bool) error {
		enc := json.NewEncoder(c.OutOrStdout())
		return client.Watch(c.Context(), func(e control.Event) error {
			switch {
			case !filter.SelectsEvent(&e):
				return nil
			case asJSON:
				return enc.Encode(e)
			}
			return control.WriteEvent(c.OutOrStdout(), e)
		})
	})
	c.Long = `Show each grant, refusal and revocation of a permission, with its reason, and each
flow that a peer opens through one (a child), as they happen, until Ctrl-C or the
end of the daemon. A terminal that is too slow loses events, and is told how many.`
	filterFlags(c.Flags(), &filter)
	return c
}

func statusCommand() *cobra.Command {
	var verify, verbose bool
	c := showCommand("status", "Show what the daemon does", func(c *cobra.Command, client *control.Client, asJSON bool) error {
		st, err := client.Status(c.Context())
		if err != nil {
			return err
		}
		if verify {
			v, err := client.Verify(c.Context())
			if err != nil {
				return err
			}
			st.Verification = &v
		}
		if asJSON {
			err = writeJSON(c, st)
		} else {
			st.Warnings = doctor.WorstFirst(st)
			err = control.WriteStatus(c.OutOrStdout(), doctor.Verdict(st), st, verbose, time.Now())
		}
		if err == nil && verify && len(st.Verification.Wrong) > 0 {
			err = fmt.Errorf("verify: %s between conenatd and the kernel; the next reconcile repairs that, or it is a bug", control.Several(len(st.Verification.Wrong), "difference"))
		}
		return err
	})
	c.Long = `Show whether conenatd works, for which subnets, and what it does. The first line is
the verdict. "conenatd doctor" says more about what does not work. Where a package
is installed and no daemon runs, say how to start it, and which networks look like
inside networks if its configuration enables none.`
	c.Flags().BoolVar(&verbose, "verbose", false, "show all counters, also those that are 0")
	c.Flags().BoolVar(&verify, "verify", false, "compare what the daemon knows with what the kernel holds")
	return c
}

func explainCommand() *cobra.Command {
	var asJSON bool
	var peer, ext netip.AddrPort
	c := clientCommand("explain PEER[:PORT] EXT:PORT", "Say whether a packet would get in, and why", exactly("PEER[:PORT]", "EXT:PORT"),
		func(c *cobra.Command, client *control.Client, _ []string) error {
			x, err := client.Explain(c.Context(), peer, ext)
			switch {
			case err != nil:
				return err
			case asJSON:
				return writeJSON(c, x)
			}
			return control.WriteExplanation(c.OutOrStdout(), x)
		})
	c.PreRunE = func(_ *cobra.Command, args []string) (err error) {
		if peer, ext, err = control.ParsePacket(args[0], args[1]); err != nil {
			return &config.UsageError{Err: err}
		}
		return nil
	}
	c.Long = `Say what would become of a UDP packet that comes from PEER by an outside link to
the outside endpoint EXT:PORT, and why: the checks of the kernel in their order,
up to the one that decides. Without a PORT of the peer, it is from any port that
has no flow yet. No packet is sent.`
	c.Example = "  conenatd explain 203.0.113.5 198.51.100.1:5060\n  conenatd explain 203.0.113.5:5070 198.51.100.1:5060"
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
