"""What tests and benchmarks have in common: tiny and true models, nodes of others, servers, killable commands."""
