// Conenatd lets peers answer hosts behind Linux source NAT from any port: restricted cone
// NAT (RFC 4787: endpoint-independent mapping with address-dependent filtering) for UDP, on
// the stock kernel.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/logs"
)

// version is set by the linker for releases.
var version = ""

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

func main() {
	caught := catchSignals()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	root, out := command(caught), &output{Writer: os.Stdout}
	root.SetOut(out)
	refuseUnknownTopics(root)
	started := false // if it stays false, the command line is wrong
	root.PersistentPreRun = func(c *cobra.Command, _ []string) {
		started = true
		if c.Name() != runName {
			caught.release()
		}
	}
	err := unknownCommand(root, root.ExecuteContext(ctx))
	if err == nil {
		err = out.err
	}
	if err != nil {
		if status := exitStatus(0); errors.As(err, &status) {
			os.Exit(int(status))
		}
		fmt.Fprint(os.Stderr, errorText(err, logs.ToJournal(os.Stderr)))
		if !started || config.IsUsage(err) {
			os.Exit(config.UsageStatus)
		}
		os.Exit(1)
	}
}

// errorText is err for people, with a priority in front of each line for the journal.
func errorText(err error, journal bool) string {
	text := fmt.Sprintln("conenatd:", err)
	if !journal {
		return text
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString(logs.Priority(slog.LevelError) + line)
	}
	return b.String()
}

func command(caught *signals) *cobra.Command {
	root := &cobra.Command{
		Use:           "conenatd",
		Short:         "Restricted cone NAT for UDP on the stock Linux kernel",
		SilenceUsage:  true,
		SilenceErrors: true,

		DisableSuggestions: true, // unknownCommand has one
	}
	root.AddCommand(
		runCommand(caught), listCommand(), statusCommand(), reloadCommand(), stopCommand(), revokeCommand(),
		flushCommand(), watchCommand(), topCommand(), explainCommand(), doctorCommand(), probeCommand(), checkCommand(), configCommand(), rulesCommand(), cleanupCommand(), demoCommand(), selftestCommand(), versionCommand(),
	)
	root.SetFlagErrorFunc(flagError)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  exactly(),
		Run: func(c *cobra.Command, _ []string) {
			fmt.Fprintln(c.OutOrStdout(), "conenatd", versionText())
		},
	}
}
