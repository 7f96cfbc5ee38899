//go:build tools

// Package tools pins the etcd programs that Baton's tests and its local federation run.
// `scripts/tools etcd` builds them; nothing here is linked into Baton.
package tools

import (
	_ "go.etcd.io/etcd/etcdctl/v3"
	_ "go.etcd.io/etcd/etcdutl/v3"
	_ "go.etcd.io/etcd/server/v3"
)
