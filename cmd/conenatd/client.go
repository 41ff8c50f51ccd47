package main

import (
	"encoding/json"
	"time"

	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/control"
)

// clientCommand is a command that talks to the running daemon. It adds the
// flags that all of these have.
func clientCommand(use, short string, ask func(c *cobra.Command, client *control.Client, asJSON bool) error) *cobra.Command {
	var socket string
	var asJSON bool
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			path, err := socketPath(socket)
			if err != nil {
				return err
			}
			return ask(c, control.Dial(path), asJSON)
		},
	}
	c.Flags().StringVar(&socket, "control-socket", "", "control socket of the daemon (default: that of this network namespace)")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func listCommand() *cobra.Command {
	return clientCommand("list", "List the permissions", func(c *cobra.Command, client *control.Client, asJSON bool) error {
		if asJSON {
			enc := json.NewEncoder(c.OutOrStdout())
			return client.Permissions(c.Context(), func(p control.Permission) error { return enc.Encode(p) })
		}
		var ps []control.Permission
		err := client.Permissions(c.Context(), func(p control.Permission) error {
			ps = append(ps, p)
			return nil
		})
		if err != nil {
			return err
		}
		return control.WriteTable(c.OutOrStdout(), ps, time.Now())
	})
}

func statusCommand() *cobra.Command {
	return clientCommand("status", "Show what the daemon does", func(c *cobra.Command, client *control.Client, asJSON bool) error {
		st, err := client.Status(c.Context())
		if err != nil {
			return err
		}
		if asJSON {
			enc := json.NewEncoder(c.OutOrStdout())
			enc.SetIndent("", "  ")
			return enc.Encode(st)
		}
		return control.WriteStatus(c.OutOrStdout(), st, time.Now())
	})
}
