// Package reference writes the manual pages, the reference of the configuration, its JSON
// schema and its example file. All of them come from the keys of package config and the
// commands of the program, so they cannot contradict the code. "make generate" writes the
// files; a test of cmd/conenatd fails when one is stale. The program does not contain this
// package.
package reference
