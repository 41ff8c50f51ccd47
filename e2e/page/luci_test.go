package page

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const luciView = "../../deploy/openwrt/luci-app-conenatd/htdocs/luci-static/resources/view/conenatd.js"

// luci runs the view, as LuCI does, with stand-ins for the parts of LuCI that it requires:
// as much of their interface as it uses. The forms are not drawn. %s are the text of the view
// and what the program answers, in JSON.
const luci = `(async () => {
	const source = %s, answer = %s;
	const widgets = [];
	const option = (widget, name) => { widgets.push(widget + " " + name); return { value() {} }; };
	const form = {
		Flag: "Flag", Value: "Value", ListValue: "ListValue", DynamicList: "DynamicList",
		NamedSection: "NamedSection", GridSection: "GridSection",
		Map: class {
			section() { return { option }; }
			async render() { return document.createTextNode("the form"); }
		},
	};
	const E = (name, ...rest) => {
		const node = Array.isArray(name) ? document.createDocumentFragment() : document.createElement(name);
		const children = rest.pop(), attrs = rest.pop() ?? {};
		for (const [ k, v ] of Object.entries(attrs)) node.setAttribute(k, v);
		node.append(...children);
		return node;
	};
	const ran = [];
	const fs = { exec: async (program, args) => { ran.push([ program, ...args ].join(" ")); if (answer === null) throw new Error("not permitted"); return answer; } };
	let again;
	const view = { extend: (v) => v };
	const poll = { add: (f) => { again = f; } };
	const page = new Function("view", "form", "fs", "poll", "E", "_", source)(view, form, fs, poll, E, (s) => s);
	document.body.replaceChildren(await page.render(await page.load()));
	await again();
	return JSON.stringify({ ran, widgets, status: document.getElementById("conenatd-status").textContent });
})()`

// The page of OpenWrt's LuCI, in a real browser but without LuCI.
//
// Fails when the view is no JavaScript, when it does not show the verdict, and when nothing
// is shown if the status cannot be read.
func TestLuCIShowsTheStatus(t *testing.T) {
	source, err := os.ReadFile(luciView)
	if err != nil {
		t.Fatal(err)
	}
	s := stage.New(t, lab.Options{})
	b := open(t, s.Gateway.Namespace)
	b.do(chromedp.Navigate("about:blank"))
	play := func(answer any) (shown struct {
		Ran, Widgets []string
		Status       string
	},
	) {
		text, err := json.Marshal(string(source))
		s.Must(err)
		reply, err := json.Marshal(answer)
		s.Must(err)
		out, err := chromedp.Run(b.ctx, chromedp.Evaluate[string](fmt.Sprintf(luci, text, reply), chromedp.EvalAwaitPromise))
		s.Must(err)
		s.Must(json.Unmarshal([]byte(out), &shown))
		return shown
	}

	down, _ := s.CLI("status")
	if got := play(map[string]any{"code": 1, "stderr": down}).Status; down == "" || got != strings.TrimSpace(down) {
		t.Errorf("without a daemon the page shows %q, want %q", got, down)
	}
	s.Serve()
	text, _ := s.CLI("status")
	shown := play(map[string]any{"code": 0, "stdout": text})
	if !strings.HasPrefix(shown.Status, "works") || shown.Status != strings.TrimSpace(text) {
		t.Errorf("the page shows %q, want %q", shown.Status, text)
	}
	if len(shown.Ran) != 2 || shown.Ran[0] != "/usr/bin/conenatd status" || len(shown.Widgets) < 10 {
		t.Errorf("got %+v", shown)
	}
	if got := play(nil).Status; got != "not permitted" {
		t.Errorf("without the permission the page shows %q", got)
	}
}
