package reference

import (
	"fmt"
	"strings"

	"github.com/conenatd/conenatd/internal/config"
)

// Example returns deploy/conenatd.toml: every key with its default, commented out.
func Example() []byte {
	var b strings.Builder
	b.WriteString(`# Configuration of conenatd. Every key is here, with its default, commented
# out. A line that starts with "#" and no blank is a key: remove the "#" to
# use it. "conenatd check FILE" says what is wrong with a file.
#
# Each key is also a flag of "conenatd run" (log_level is --log-level), in the
# singular if it may be repeated (exclude_peers is --exclude-peer). Flags override
# the file.
`)
	for _, s := range config.Sections() {
		for _, k := range s.Keys {
			doc := k.Doc
			if k.Restart {
				doc += " A change needs a restart."
			}
			fmt.Fprintf(&b, "\n%s\n#%s = %s\n", wrap(doc, "# "), k.Name, k.Default)
		}
	}
	fmt.Fprintf(&b, "\n%s\n#[[subnet]]\n", wrap(subnetsIntro, "# "))
	for _, k := range config.SubnetKeys() {
		value := k.Default
		if k.Name == "prefix" {
			value = `"192.168.1.0/24"`
		}
		fmt.Fprintf(&b, "%s\n#%s = %s\n", wrap(k.Doc, "# "), k.Name, value)
	}
	return []byte(b.String())
}
