package config

import (
	"strings"
	"testing"
)

// Fails when "conenatd check" says nothing of what the chosen backend cannot give, or names something
// that it can.
func TestWhatTheBackendCannotGiveIsSaid(t *testing.T) {
	for text, want := range map[string]string{
		"backend = \"expect\"\n[[subnet]]\nprefix = \"10.1.0.0/16\"\n[[subnet]]\nprefix = \"10.2.0.0/16\"\nfiltering = \"endpoint_independent\"": `with backend = "expect" the subnet 10.2.0.0/16 gets`,
		"backend = \"expect\"\n[[subnet]]\nprefix = \"lan0\"\nfiltering = \"endpoint_independent\"":                                              `the subnet lan0 gets`,
		"backend = \"nft\"\n[[subnet]]\nprefix = \"2001:db8::/64\"":                                                                              `with backend = "nft" the subnet 2001:db8::/64 gets no permission`,
		"backend = \"nft\"\n[[subnet]]\nprefix = \"10.2.0.0/16\"\nrouted = true":                                                                 `the untranslated flows of 10.2.0.0/16 give no permission`,
		"backend = \"nft\"\n[[subnet]]\nprefix = \"10.2.0.0/16\"\nrouted = true\nfiltering = \"address_and_port_dependent\"":                     "",
		"backend = \"nft\"\n[[subnet]]\nprefix = \"10.2.0.0/16\"\nfiltering = \"endpoint_independent\"":                                          "",
		"[[subnet]]\nprefix = \"10.2.0.0/16\"\nfiltering = \"endpoint_independent\"":                                                             "",
		"backend = \"expect\"\n[[subnet]]\nprefix = \"10.2.0.0/16\"\nmapping = \"endpoint_independent\"":                                         "",
	} {
		cfg, err := whole("c.toml", text)
		if err != nil {
			t.Fatal(err)
		}
		if got := cfg.Uncarried(); !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%s\n: %q, want %q", text, got, want)
		}
	}
}
