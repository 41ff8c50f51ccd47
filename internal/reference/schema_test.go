package reference

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/conenatd/conenatd/internal/config"
)

// validator returns the schema, ready to validate.
func validator(t *testing.T) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// validate returns what the schema says of a TOML file.
func validate(t *testing.T, s *jsonschema.Schema, data string) error {
	t.Helper()
	var v map[string]any
	if _, err := toml.Decode(data, &v); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	x, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return s.Validate(x)
}

// load returns what conenatd says of it.
func load(t *testing.T, data string) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := config.Load(path)
	return err
}

// Fails when the schema refuses a file that conenatd accepts.
func TestTheSchemaAcceptsGoodFiles(t *testing.T) {
	s := validator(t)
	example := string(Example())
	for name, data := range map[string]string{
		"empty":                 "",
		"the example":           example,
		"the example, in force": regexp.MustCompile(`(?m)^#(\S)`).ReplaceAllString(strings.Replace(example, "#port_pool = \"\"", "", 1), "$1"),
		"words and ranges": `
backend = "nft"
lifetime = "1h30m"
outside = ["wan0.7", "br-lan"]
port_pool = ["7472-7487", 61000]
uplink_mask = 0xff
exclude_ports = [1, "5-6"]
max_children = 0
control_socket = "/run/c"
metrics_listen = "127.0.0.1:9469"
[[subnet]]
prefix = "auto"
[[subnet]]
prefix = "2001:db8::/64"
routed = true
[[subnet]]
prefix = "lan0"
mapping = "endpoint_independent"
port_pool = "none"
`,
	} {
		if err := load(t, data); err != nil {
			t.Errorf("%s: conenatd: %v", name, err)
		}
		if err := validate(t, s, data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Fails when the schema accepts a file that has a wrong key, type or value.
func TestTheSchemaRefusesWrongFiles(t *testing.T) {
	s := validator(t)
	for _, data := range []string{
		`lifetme = "5m"`, `backend = "exepct"`, `lifetime = "5 minutes"`, `lifetime = 300`, `learn = "yes"`, `learn_rate = 0`, `learn_rate = 100001`,
		`outside = "wan0"`, `outside = ["a/b"]`, `outside = ["a23456789-123456"]`, `exclude_peers = ["203.0.113.7"]`, `exclude_ports = [0]`,
		`exclude_ports = 5060`, `exclude_ports = ["5060"]`, `max_permissions = "auto"`, `max_children = -1`, `max_children = "many"`, `event_buffer = 4096`,
		`control_socket = "c.sock"`, `metrics_listen = ":9469"`, `metrics_listen = "localhost:9469"`, `uplink_mask = 0`, `table = "a b"`, `port_pool = []`, `port_pool = "some"`, `port_pool = ""`, `log_level = "INFO"`,
		"[[subnet]]\nrouted = true", "[[subnet]]\nprefix = \"a/b\"", "[[subnet]]\nprefix = \"lan0\"\nfiltering = \"full\"",
		"[[subnet]]\nprefix = \"lan0\"\nlifetime = \"5m\"", "[subnet]\nprefix = \"lan0\"", "[[subnets]]\nprefix = \"lan0\"",
	} {
		if load(t, data) == nil {
			t.Errorf("conenatd accepts %s", data)
		}
		if validate(t, s, data) == nil {
			t.Errorf("the schema accepts %s", data)
		}
	}
}
