package page

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A browser is a tab of Debian's Chromium that runs in a network namespace.
type browser struct {
	t   *testing.T
	ctx context.Context
}

// open starts a browser in a namespace. To it, *.example is
// 127.0.0.1, and no other name is known.
func open(t *testing.T, ns *lab.Namespace) *browser {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		debian.Missing(t, "no browser: install the Debian package chromium")
	}
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(program),
		chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("host-resolver-rules", "MAP *.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE 10.47.11.1"),
		chromedp.ModifyCmdFunc(func(cmd *exec.Cmd) {
			cmd.Args = append([]string{"nsenter", fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), ns.FD()), cmd.Path}, cmd.Args[1:]...)
			cmd.Path = "/usr/bin/nsenter"
		}))...)
	t.Cleanup(cancel)
	ctx, end := context.WithTimeout(ctx, 5*time.Minute)
	t.Cleanup(end)
	return newTab(t, ctx)
}

func newTab(t *testing.T, ctx context.Context) *browser {
	ctx, closeTab := chromedp.NewContext(ctx)
	t.Cleanup(closeTab)
	return &browser{t, ctx}
}

// do carries out actions.
func (b *browser) do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, actions...); err != nil {
		b.t.Fatal(err)
	}
}

// eval returns the value of an expression in the page.
func eval[T any](b *browser, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		b.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// text returns the text that a person sees in the elements of a selector.
func (b *browser) text(selector string) string {
	b.t.Helper()
	return eval[string](b, fmt.Sprintf(`Array.from(document.querySelectorAll(%q)).filter((e) => e.checkVisibility()).map((e) => e.innerText).join("\n")`, selector))
}

// shows waits until the elements of a selector show all words.
func (b *browser) shows(s *stage.Scene, selector string, words ...string) {
	b.t.Helper()
	var text string
	defer func() {
		if b.t.Failed() {
			b.t.Logf("%s: %q", selector, text)
		}
	}()
	s.Until(fmt.Sprintf("%s shows %q", selector, words), func() bool {
		text = b.text(selector)
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) })
	})
}

// search types text into the empty search field.
func (b *browser) search(text string) {
	b.t.Helper()
	eval[string](b, `document.getElementById("search").value = ""`)
	b.do(chromedp.SendKeys(chromedp.ID("search"), text))
}

// look makes the page wide or narrow, light or dark.
func (b *browser) look(width, height int64, scheme string) {
	b.t.Helper()
	b.do(chromedp.EmulateViewport(width, height))
	_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// console returns a function that returns what was written to the console, by scripts or by
// the browser, since console was called.
func (b *browser) console() func() []string {
	messages := chromedp.Console(b.ctx)
	return func() (all []string) {
		b.t.Helper()
		const end = "the test ends"
		eval[chromedp.Void](b, fmt.Sprintf("console.log(%q)", end))
		for m, err := range messages {
			switch {
			case err != nil:
				b.t.Fatal(err)
			case m.Text == end:
				return all
			}
			all = append(all, m.String())
		}
		b.t.Fatal("the console ended")
		return nil
	}
}
