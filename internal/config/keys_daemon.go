package config

import (
	"log/slog"
	"net/netip"
	"time"
)

// basicKeys are in the section "Basics".
var basicKeys = []setting[Config]{
	{
		Key: Key{
			Name: "backend", Flag: "backend", Kind: "word",
			Usage: "what carries permissions: auto (all that there is), expect or nft",
			Doc: `What carries permissions in the kernel: "expect" (conntrack expectations), "nft" (elements
of an nftables map; your firewall must accept "ct status dnat" in its forward chain), or
"auto": the map where possible, expectations where needed.`,
		},
		access: word(func(c *Config) *Backend { return &c.Backend }, BackendAuto, BackendExpect, BackendNFT),
	},
	{
		Key: Key{
			Name: "lifetime", Flag: "lifetime", Kind: "duration", Range: "1s to 24h",
			Usage: "how long a permission stands after the inside host was last heard, 1s to 24h",
			Doc: `How long a permission lasts after the inside host was last heard (RFC 4787 REQ-5). From "1s"
to "24h".`,
		},
		access: one(duration(time.Second, 24*time.Hour, `between 1s and 24h such as "5m"`), func(c *Config) *time.Duration { return &c.Lifetime }),
	},
	{
		Key: Key{
			Name: "reconcile", Flag: "reconcile", Kind: "duration", Range: "1s to 1h", Restart: true,
			Usage: "time between two comparisons with the kernel, 1s to 1h",
			Doc:   `Interval at which the kernel's state is compared with the desired state. From "1s" to "1h".`,
		},
		access: one(duration(time.Second, time.Hour, `between 1s and 1h such as "30s"`), func(c *Config) *time.Duration { return &c.Reconcile }),
	},
	{
		Key: Key{
			Name: "log_level", Flag: "log-level", Kind: "word",
			Usage: "least level that is logged: debug, info, warn or error",
			Doc: `Lowest level that is logged: "debug", "info", "warn" or "error". Each grant and each end of
a permission is logged at "debug".`,
		},
		access: word(func(c *Config) *slog.Level { return &c.LogLevel }, slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError),
	},
	{
		Key: Key{
			Name: "log_format", Flag: "log-format", Kind: "word", Restart: true,
			Usage: "form of the log: text, json, journal (text behind a priority), or auto (text on a terminal, journal for systemd's journal, json otherwise)",
			Doc: `Form of the log: "text"; "json"; "journal", which is text behind a priority for systemd's journal;
or "auto": text on a terminal, journal where systemd reads the log, and JSON otherwise. In JSON
durations are seconds.`,
		},
		access: word(func(c *Config) *LogFormat { return &c.LogFormat }, AutoLog, TextLog, JSONLog, JournalLog),
	},
}

// kernelKeys are in the section "Work in the kernel".
var kernelKeys = []setting[Config]{
	{
		Key: Key{
			Name: "learn", Flag: "learn", Kind: "bool",
			Usage: "let the kernel itself add a permission to the map while the first packet passes (not with backend expect)",
			Doc: `Let the kernel itself add a permission to the nftables map while the first packet of a flow
is still inside, so that no answer comes too early, even while the daemon is down. Has no
effect with backend "expect".`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.Learn }),
	},
	{
		Key: Key{
			Name: "learn_rate", Flag: "learn-rate", Kind: "number", Min: 1, Max: 100000,
			Usage: "permissions that the kernel learns from one inside address in a second, 1 to 100000",
			Doc: `How many permissions per second the kernel learns this way from one inside address; bursts
may be five times as large. From 1 to 100000. Flows beyond that wait for the daemon, some
hundred microseconds.`,
		},
		access: one(learnRate, func(c *Config) *int { return &c.LearnRate }),
	},
	{
		Key: Key{
			Name: "events", Flag: "events", Kind: "word",
			Usage: "flows that the kernel reports: all, lean (not those whose permission it learned or that can have none), or auto (lean while it learns fast)",
			Doc: `Which flows the kernel reports to conenatd when they begin. "lean": not those whose
permission the kernel has learned, and not those that can have none (excluded ports, TCP
over IPv4); conenatd finds the former when it reads the conntrack table, three times in a
lifetime or more often, and for "list" and "revoke". That makes new flows much cheaper, but
a report that the kernel does not make is missing in every program that listens. So all
flows are reported while another program listens to conntrack (conntrackd, ulogd, conntrack
-E), and where a report may matter: with expectations for a subnet whose permissions the
kernel learns, without the guard, with conntrack zones, with a lifetime below 30 seconds,
and while "conenatd watch" runs or audit_log is set. "auto": lean while the kernel learns
more than 2,000 permissions a second. "all": always all.`,
		},
		access: word(func(c *Config) *Events { return &c.Events }, AutoEvents, AllEvents, LeanEvents),
	},
	{
		Key: Key{
			Name: "quiet", Flag: "quiet", Kind: "bool",
			Usage: "let the kernel report no flows that can have no permission (TCP and excluded peer ports, over IPv4), while no other program listens",
			Doc: `Let the kernel report no flows that can have no permission: TCP over IPv4, and UDP over
IPv4 to or from excluded ports. They are most of the flows of a network, and each report
makes its first packet more expensive. Without this setting they are hidden together with
those of "events", while many flows begin. With it, they always are, unless another program
listens to conntrack (conntrackd, ulogd, conntrack -E): then all flows are reported, within
a quarter of a second. Where the kernel learns no permissions (expectations alone, or learn
= false), flows from exclude_ports stay reported, and with mapping all UDP flows.`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.Quiet }),
	},
	{
		Key: Key{
			Name: "guard", Flag: "guard", Kind: "bool",
			Usage: "drop UDP packets from outside that no socket of the gateway waits for, or with the source of an inside host, before they become a flow",
			Doc: `Drop new UDP packets from outside for which the gateway has no socket, in a chain of
conenatd's own table after your input rules. Otherwise a packet that arrives before its
permission could become a flow to the gateway and lock its sender out. What you lose is the
gateway's own ICMP "port unreachable", and programs that read such packets from a raw
socket. The guard also drops UDP packets that come from outside, are not for the gateway
itself, and have the source of a host of an enabled subnet that is reached by an inside
link: with them an attacker could open ports of that host and keep them open. (Not if an "ip
rule" matches something that only the answers have: marks other than uplink_mask, iif, UDP
ports, tos, dscp, tun_id.)`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.Guard }),
	},
	{
		Key: Key{
			Name: "table", Flag: "table", Kind: "name", Restart: true,
			Usage: "name of conenatd's own nftables table",
			Doc: `Name of conenatd's own nftables tables (families inet and ip). After a change of the name,
the next start takes over the permissions in the old tables and removes these.`,
		},
		access: one(table, func(c *Config) *string { return &c.Table }),
	},
}

// daemonKeys are in the section "The daemon".
var daemonKeys = []setting[Config]{
	{
		Key: Key{
			Name: "audit_log", Flag: "audit-log", Kind: "path",
			Usage: "file for the begin and the end of each mapping and child (default: none)",
			Doc: `File for the begin and the end of each mapping and of each flow that a peer opened (child),
with the fields of RFC 6888 section 4, a JSON object a line: docs/audit.md. It has mode 0600; a
reload opens it again, after logrotate moved it. The daemon does not wait for it: what is lost
is counted there and in the log. While it is on, the kernel reports all flows, as with events =
"all". Empty: none.`,
		},
		access: one(absolutePath, func(c *Config) *string { return &c.AuditLog }),
	},
	{
		Key: Key{
			Name: "audit_peers", Flag: "audit-peers", Kind: "bool",
			Usage: "add the addresses and ports of peers to the audit log",
			Doc: `Add the addresses and ports of peers to the audit log. They tell whom people talk to, so RFC 6888
REQ-12 asks not to log them unless you must.`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.AuditPeers }),
	},
	{
		Key: Key{
			Name: "on_stop", Flag: "on-stop", Kind: "word",
			Usage: "what a stop does with permissions: revoke, or keep for a new daemon to take over",
			Doc: `What a stop does with permissions: "revoke" removes them from the kernel, "keep" leaves them
for a new daemon to take over (for an upgrade), together with the sysctls that conenatd
raised for them.`,
		},
		access: word(func(c *Config) *OnStop { return &c.OnStop }, OnStopRevoke, OnStopKeep),
	},
	{
		Key: Key{
			Name: "event_buffer", Flag: "event-buffer", Kind: "bytes", Min: 65536, Max: 1 << 30, Restart: true,
			Usage: "receive buffer of the event socket, 65536 to 1073741824",
			Doc:   `Receive buffer of the event socket in bytes, from 65536 to 1073741824.`,
		},
		access: one(eventBuffer, func(c *Config) *int { return &c.EventBuffer }),
	},
	{
		Key: Key{
			Name: "control_socket", Flag: "control-socket", Kind: "path", Restart: true,
			Usage: "control socket (default: one per network namespace)",
			Doc: `Path of the control socket. Empty: a separate one for each network namespace, in /run/conenatd.
A missing folder is made, with mode 0755, and stays. Commands find the socket in any case.`,
		},
		access: one(socketPath, func(c *Config) *string { return &c.ControlSocket }),
	},
	{
		Key: Key{
			Name: "metrics_listen", Flag: "metrics-listen", Kind: "endpoint", Restart: true,
			Usage: "where Prometheus may scrape /metrics, and a browser sees the page, such as 127.0.0.1:9469 (default: nowhere)",
			Doc: `Address and port where Prometheus may scrape /metrics, such as "127.0.0.1:9469". Empty: nowhere.
Whoever reaches it can read the metrics, so think twice before you name an address that is not of
loopback; your firewall decides who reaches that. A browser sees a page there (docs/page.md): see
the key page.`,
		},
		access: one(listen, func(c *Config) *netip.AddrPort { return &c.MetricsListen }),
	},
	{
		Key: Key{
			Name: "page", Flag: "page", Kind: "word", Restart: true,
			Usage: "where metrics_listen also serves the page for people: loopback, everywhere or off",
			Doc: `Where metrics_listen also serves the page for people, which shows the addresses of hosts and
peers, without a password: "loopback" answers only requests that came to a loopback address, so
every user of the gateway can read it; "everywhere" answers whoever reaches metrics_listen; "off"
answers nobody.`,
		},
		access: word(func(c *Config) *Page { return &c.Page }, PageLoopback, PageEverywhere, PageOff),
	},
}
