package config

import _ "embed"

//go:embed example.toml
var example string

// Example returns a configuration file with every key, its comment and its
// default. What is commented out is the default.
func Example() string { return example }
