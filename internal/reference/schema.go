package reference

import (
	"encoding/json"

	"github.com/conenatd/conenatd/internal/config"
)

// object is a JSON object.
type object = map[string]any

// Schema returns deploy/conenatd.schema.json, a JSON schema (draft 2020-12) of the file.
// It accepts each file that config.Load accepts. It cannot know which values contradict each
// other.
func Schema() []byte {
	properties := object{}
	for _, s := range config.Sections() {
		for _, k := range s.Keys {
			properties[k.Name] = property(k)
		}
	}
	subnet := object{}
	for _, k := range config.SubnetKeys() {
		subnet[k.Name] = property(k)
	}
	subnet["prefix"].(object)["anyOf"] = []any{value(config.Key{Kind: "prefix"}), value(config.Key{Kind: "link"})} // "auto" could be a link
	properties["subnet"] = object{
		"description": subnetsIntro,
		"type":        "array",
		"items":       table(subnet, "prefix"),
	}
	schema := table(properties)
	schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	schema["title"] = "conenatd.toml"
	text, err := json.MarshalIndent(schema, "", "  ")
	if err != nil {
		panic(err) // only strings, numbers and maps
	}
	return append(text, '\n')
}

// table is the schema of a table with these keys and no others.
func table(properties object, required ...string) object {
	t := object{"type": "object", "properties": properties, "additionalProperties": false}
	if len(required) > 0 {
		t["required"] = required
	}
	return t
}

// property is the schema of one key.
func property(k config.Key) object {
	p := object{"description": wrap(k.Doc, "")}
	switch {
	case k.Name == "prefix":
		return p
	case k.Kind == "ports":
		one := value(k)
		p["anyOf"] = []any{object{"enum": k.Words}, one, object{"type": "array", "items": one, "minItems": 1}}
	case k.List:
		p["type"], p["items"] = "array", value(k)
	case k.Kind != "word" && len(k.Words) > 0:
		p["anyOf"] = []any{object{"enum": k.Words}, value(k)}
	default:
		for key, v := range value(k) {
			p[key] = v
		}
	}
	var v any
	if k.Default != "" && json.Unmarshal([]byte(k.Default), &v) == nil { // hexadecimal numbers are not JSON
		p["default"] = v
	}
	return p
}

// value is the schema of a value, or of an item of a list.
func value(k config.Key) object {
	text := func(pattern string) object { return object{"type": "string", "pattern": pattern} }
	number := func(least, most int64) object {
		return object{"type": "integer", "minimum": least, "maximum": most}
	}
	switch k.Kind {
	case "word":
		return object{"enum": k.Words}
	case "bool":
		return object{"type": "boolean"}
	case "number", "bytes":
		return number(k.Min, k.Max)
	case "bits":
		return number(1, 1<<32-1)
	case "duration":
		return text(`^\+?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+$`)
	case "link":
		return text(`^[^/:\s]{1,15}$`)
	case "prefix":
		return text(`^[0-9a-fA-F:.]+/[0-9]{1,3}$`)
	case "port":
		return object{"anyOf": []any{number(1, 65535), text(`^[0-9]{1,5}-[0-9]{1,5}$`)}}
	case "ports":
		return object{"anyOf": []any{number(1, 65535), text(`^[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*$`)}}
	case "name":
		return text(`^[A-Za-z][A-Za-z0-9_]{0,31}$`)
	case "endpoint":
		return text(`^([0-9.]+:|\[[0-9a-fA-F:.]+(%.+)?\]:)[0-9]{1,5}$|^$`)
	case "path":
		return object{"type": "string", "pattern": `^(/.*)?$`, "maxLength": 4095}
	}
	panic("no schema for " + k.Kind)
}
