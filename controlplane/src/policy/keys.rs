//! The keys of a policy file, once: the loader knows no others, and the published schema is made of them.

use vnet_proto::model::{Mode, NameDemand, Protocol};

use crate::policy::file::FORWARD_PROTOCOLS;
use crate::policy::list::ListFormat;
use crate::policy::settings::{Denial, DnsGuard, GuardAction, PENDING_MAX, QUERIES_MAX, WidestScope};
use crate::policy::{DefaultAction, DnsAnswer, EchGuard, ForwardAction, QuicGuard, RuleAction};

/// The keys that one mapping may have.
#[derive(Debug)]
pub(crate) struct Table {
    /// In the order in which they are told.
    pub(crate) keys: &'static [Key],
    /// Keys that must be there.
    pub(crate) required: &'static [&'static str],
}

impl Table {
    /// The keys' names.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.keys.iter().map(|key| key.name).collect()
    }
}

/// One key.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    /// What it is for, in one sentence, as editors show it.
    pub(crate) about: &'static str,
}

/// What a key's value may be.
#[derive(Debug)]
pub(crate) enum Shape {
    /// This number alone.
    Exactly(i64),
    Boolean,
    /// Text on one line.
    Text,
    /// One of a few words.
    Word(fn() -> Vec<String>),
    /// Seconds, or text as `30s`.
    Span,
    /// A moment, as `2026-12-31T00:00:00Z`.
    Moment,
    /// A name, or `*.name`.
    Name,
    /// An address or prefix.
    Prefix,
    /// A port, or a range as text.
    Port,
    /// Ports, an address, or both.
    Listen,
    /// A whole number between these two.
    Count(u32, u32),
    /// A regular expression.
    Pattern,
    /// A name or `*.name`, or an address or prefix.
    NameOrPrefix,
    /// Either of two.
    Either(&'static Shape, &'static Shape),
    /// A file's path, relative to the policy.
    Path,
    /// A list.
    List(&'static Shape),
    /// A list that is not empty, or one item in its place.
    Some(&'static Shape),
    /// A mapping.
    Map(&'static Table),
    /// A mapping whose keys are the author's.
    MapOf(&'static Shape),
}

const fn key(name: &'static str, shape: Shape, about: &'static str) -> Key {
    Key { name, shape, about }
}

const fn table(keys: &'static [Key]) -> Table {
    Table { keys, required: &[] }
}

fn words<T: ToString>(all: &[T]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

/// Modes that a document may say.
pub(crate) const MODES: [Mode; 4] = [Mode::Enforce, Mode::Ask, Mode::Observe, Mode::Block];

pub(crate) const DEFAULT_ACTIONS: [DefaultAction; 2] = [DefaultAction::Allow, DefaultAction::Deny];

/// `dns.answer`.
pub(crate) const DNS_ANSWERS: [DnsAnswer; 2] = [DnsAnswer::Real, DnsAnswer::Synthetic];

const MODE: Shape = Shape::Word(|| words(&MODES));
const DNS_ANSWER: Shape = Shape::Word(|| words(&DNS_ANSWERS));
const DEFAULT_ACTION: Shape = Shape::Word(|| words(&DEFAULT_ACTIONS));

/// The document itself.
pub(crate) static DOCUMENT: Table = table(&[
    key(
        "version",
        Shape::Exactly(1),
        "The form of the file. Without it, and without dns, lookups stay open (the form of gvproxy's draft).",
    ),
    key(
        "appliesTo",
        Shape::Map(&SELECTOR),
        "Which VMs are under this policy; to be left out in policy default.",
    ),
    key(
        "mode",
        MODE,
        "What happens to what nothing decides; enforce if left out.",
    ),
    key(
        "interactive",
        Shape::Boolean,
        "true is another way to write mode: ask.",
    ),
    key(
        "blockAllOutbound",
        Shape::Boolean,
        "true is another way to write mode: block.",
    ),
    key(
        "defaultAction",
        DEFAULT_ACTION,
        "What is done where nothing else answers; deny if left out.",
    ),
    key(
        "approvalTimeout",
        Shape::Span,
        "How long a packet is held for a person's answer; 30 seconds if left out, an hour at most.",
    ),
    key(
        "sets",
        Shape::MapOf(&Shape::Map(&SET)),
        "Names and prefixes that rules and dns refer to as @name.",
    ),
    key(
        "rules",
        Shape::List(&Shape::Map(&RULE)),
        "Rules, in order; the first that matches decides.",
    ),
    key(
        "forwards",
        Shape::List(&Shape::Map(&FORWARD_RULE)),
        "Which ports of the host's loopback VMs may open to ports of their own by themselves; the first that matches decides.",
    ),
    key(
        "outboundAllow",
        Shape::List(&Shape::Pattern),
        "Regular expressions (gvproxy's draft): TLS connections on port 443 to names that one matches are allowed.",
    ),
    key("dns", Shape::Map(&DNS), "What is done with lookups."),
    key(
        "guards",
        Shape::Map(&GUARDS),
        "What a broad rule does not open; everything named here is closed if left out.",
    ),
    key(
        "profiles",
        Shape::List(&Shape::Map(&PROFILE)),
        "Settings for some VMs, before the document's own; the first whose vm matches.",
    ),
    key(
        "approvals",
        Shape::Map(&APPROVALS),
        "What people may be asked, and what they may answer.",
    ),
    key("onControllerLoss", CONTROLLER_LOSS, ABOUT_CONTROLLER_LOSS),
    key(
        "tests",
        Shape::List(&Shape::Map(&TEST)),
        "What this policy must do, asked of it whenever it is loaded; one that fails is refused.",
    ),
]);

/// `vm`, and `appliesTo`.
pub(crate) static SELECTOR: Table = table(&[
    key("name", Shape::Text, "A VM's name, or a pattern as agent-*."),
    key(
        "labels",
        Shape::MapOf(&Shape::Text),
        "Labels that a VM must have, all of them.",
    ),
]);

/// One of `sets`.
pub(crate) static SET: Table = table(&[
    key(
        "domains",
        Shape::Some(&Shape::Name),
        "Names, and *.name for all below one.",
    ),
    key("cidrs", Shape::Some(&Shape::Prefix), "Addresses and prefixes."),
    key(
        "file",
        Shape::Path,
        "A list of names or prefixes, by its path relative to the policy; vnetctl sends it along.",
    ),
    key(
        "format",
        Shape::Word(|| words(&ListFormat::ALL)),
        "How the file's lines are written; auto (that of its first entry) if left out.",
    ),
]);

/// One of `rules`.
pub(crate) static RULE: Table = Table {
    required: &["action"],
    keys: &[
        key(
            "name",
            Shape::Text,
            "Its name in reasons; rules[N] (from 0) if left out.",
        ),
        key(
            "action",
            Shape::Word(|| words(&RuleAction::ALL)),
            "What is done with what matches.",
        ),
        key("cidr", Shape::Prefix, "A destination, or @set; any if left out."),
        key(
            "cidrs",
            Shape::Some(&Shape::Prefix),
            "Destinations, or @set; any if left out.",
        ),
        key(
            "ports",
            Shape::Some(&Shape::Port),
            "Ports, and ranges as \"8000-8999\"; any if left out.",
        ),
        key(
            "protocol",
            Shape::Some(&Shape::Word(|| {
                let mut all = words(&Protocol::ALL);
                all.push("any".to_owned());
                all
            })),
            "If left out: any for deny and drop; tcp and udp for allow and ask, and wherever ports are given.",
        ),
        key(
            "domains",
            Shape::Some(&Shape::Name),
            "Names, *.name for all below one, or @set: their lookups, and connections to what they are bound to.",
        ),
        key(
            "sni",
            Shape::Word(|| words(&NameDemand::WRITTEN)),
            "Whether a connection must say one of the names itself; require on 443 and 80, else match-if-present.",
        ),
        key(
            "vm",
            Shape::Map(&SELECTOR),
            "Which VMs it is for; all under this policy if left out.",
        ),
        key(
            "until",
            Shape::Moment,
            "When it ends, in UTC; it matches nothing from then on.",
        ),
        key("comment", Shape::Text, "Its author's words, shown in reasons."),
    ],
};

/// One of `forwards`.
pub(crate) static FORWARD_RULE: Table = Table {
    required: &["action"],
    keys: &[
        key(
            "name",
            Shape::Text,
            "Its name in reasons; forwards[N] (from 0) if left out.",
        ),
        key(
            "action",
            Shape::Word(|| words(&ForwardAction::ALL)),
            "What is done with what matches.",
        ),
        key(
            "protocol",
            Shape::Word(|| words(&FORWARD_PROTOCOLS)),
            "tcp and udp if left out.",
        ),
        key(
            "listen",
            Shape::Some(&Shape::Listen),
            "Where on the host, as \"127.0.0.1:8000-8999\": ports, an address of loopback, or both; any if left out.",
        ),
        key(
            "guestPorts",
            Shape::Some(&Shape::Port),
            "Ports of the VM, and ranges as \"8000-8999\"; any if left out.",
        ),
        key(
            "vm",
            Shape::Map(&SELECTOR),
            "Which VMs it is for; all under this policy if left out.",
        ),
        key("comment", Shape::Text, "Its author's words, shown in reasons."),
    ],
};

const CONTROLLER_LOSS: Shape = Shape::Either(&Shape::Word(|| vec!["deny".to_owned()]), &Shape::Span);

const ABOUT_CONTROLLER_LOSS: &str = "How long the file's allows that a dataplane remembers hold without a controlplane: a time (at least 1m), or \
     deny, which is 1m; deny if left out. Nothing new opens meanwhile.";

const TTL: Key = key(
    "ttl",
    Shape::Map(&DNS_TTL),
    "Bounds of the time for which an answer holds, for the guest and for what it teaches.",
);

const DENY_WITH: Key = key(
    "denyWith",
    Shape::Either(&DENIAL, &DENIAL_MAP),
    "How a lookup that is denied is answered; refused if left out.",
);

const LIMITS: Key = key(
    "limits",
    Shape::Map(&DNS_LIMITS),
    "How many lookups of a VM may go upstream.",
);

static DENIAL_MAP: Shape = Shape::Map(&DNS_DENIAL);

const DENIAL: Shape = Shape::Word(|| words(&Denial::ALL));

/// `dns.ttl`.
pub(crate) static DNS_TTL: Table = table(&[
    key(
        "min",
        Shape::Span,
        "Shorter times are raised to it; 0 if left out.",
    ),
    key(
        "max",
        Shape::Span,
        "Longer times are cut to it; 1h if left out, 24h at most.",
    ),
]);

/// `dns.denyWith`, as a mapping.
pub(crate) static DNS_DENIAL: Table = table(&[
    key("code", DENIAL, "The response code; refused if left out."),
    key(
        "text",
        Shape::Text,
        "The text of the Extended DNS Error; the reason of the denial if left out.",
    ),
]);

/// `dns.limits`.
pub(crate) static DNS_LIMITS: Table = table(&[
    key(
        "queriesPerSecond",
        Shape::Count(1, QUERIES_MAX),
        "Lookups in a second; 500 if left out.",
    ),
    key(
        "queriesPerMinute",
        Shape::Count(1, QUERIES_MAX),
        "Lookups in a minute; 6000 if left out.",
    ),
    key(
        "namesPerDomain",
        Shape::Count(1, QUERIES_MAX),
        "Different names below one registrable domain in a minute; 300 if left out.",
    ),
]);

const GUARD: Shape = Shape::Word(|| words(&GuardAction::ALL));

// Those that a profile may say as well.
const METADATA: Key = key("metadata", GUARD, "Cloud metadata and link-local addresses.");
const HOST: Key = key("host", GUARD, "Every address of the host.");
const PRIVATE_FROM_DNS: Key = key("privateFromDns", GUARD, "Private addresses that a name gave.");
const GUESTS: Key = key("guests", GUARD, "Other guests.");
const OTHER_DNS: Key = key(
    "dns",
    Shape::Word(|| words(&DnsGuard::ALL)),
    "Other DNS servers, whatever the transport; redirect has port 53 answered by the gateway.",
);

/// `guards`.
pub(crate) static GUARDS: Table = table(&[
    METADATA,
    HOST,
    PRIVATE_FROM_DNS,
    GUESTS,
    OTHER_DNS,
    key(
        "resolvers",
        Shape::List(&Shape::NameOrPrefix),
        "Names and addresses of DNS servers beside those that are built in, or @set.",
    ),
    key(
        "ech",
        Shape::Word(|| words(&EchGuard::ALL)),
        "A hello that hides its name where one is demanded: deny it (if left out), or let the outer name count.",
    ),
    key(
        "quic",
        Shape::Word(|| words(&QuicGuard::ALL)),
        "QUIC where a name is demanded: inspect it (if left out), or deny it.",
    ),
]);

/// `guards` of a profile.
pub(crate) static PROFILE_GUARDS: Table = table(&[METADATA, HOST, PRIVATE_FROM_DNS, GUESTS, OTHER_DNS]);

/// `approvals`.
pub(crate) static APPROVALS: Table = table(&[
    key(
        "maxPendingPerVm",
        Shape::Count(1, PENDING_MAX),
        "Requests that one VM may have open; 1024 if left out. Beyond it what would be asked is denied.",
    ),
    key(
        "maxRequestsPerMinute",
        Shape::Count(1, PENDING_MAX),
        "Requests that one VM may open within a minute; any number if left out.",
    ),
    key(
        "maxLifetime",
        Shape::Either(&Shape::Word(|| words(&["untilVmStops", "forever"])), &Shape::Span),
        "The longest time that a yes may hold; forever if left out.",
    ),
    key(
        "maxScope",
        Shape::Word(|| words(&WidestScope::ALL)),
        "How much a yes may cover at most: one port of a host or name, all of it, or all names below one's domain.",
    ),
]);

/// One of `profiles`.
pub(crate) static PROFILE: Table = Table {
    required: &["vm"],
    keys: &[
        key("name", Shape::Text, "Its name, for people."),
        key("vm", Shape::Map(&SELECTOR), "Which VMs it is for."),
        key("mode", MODE, "The document's if left out."),
        key("defaultAction", DEFAULT_ACTION, "The document's if left out."),
        key("approvalTimeout", Shape::Span, "The document's if left out."),
        key(
            "dns",
            Shape::Map(&PROFILE_DNS),
            "What is done with lookups; each key is the document's if left out.",
        ),
        key(
            "guards",
            Shape::Map(&PROFILE_GUARDS),
            "Each key is the document's if left out.",
        ),
        key(
            "approvals",
            Shape::Map(&APPROVALS),
            "Each key is the document's if left out.",
        ),
        key("onControllerLoss", CONTROLLER_LOSS, "The document's if left out."),
    ],
};

/// `dns` of a profile.
pub(crate) static PROFILE_DNS: Table = table(&[
    key("defaultAction", DEFAULT_ACTION, "The document's if left out."),
    TTL,
    DENY_WITH,
    LIMITS,
]);

/// `dns`.
pub(crate) static DNS: Table = table(&[
    key(
        "defaultAction",
        DEFAULT_ACTION,
        "What is done with lookups that nothing decides; the document's defaultAction if left out.",
    ),
    key(
        "allowedDomains",
        Shape::List(&Shape::Name),
        "Names, *.name or @set: their lookups and any port of what they are bound to are allowed.",
    ),
    key(
        "blockedDomains",
        Shape::List(&Shape::Name),
        "Names, *.name or @set: refused before anything else.",
    ),
    TTL,
    DENY_WITH,
    LIMITS,
    key(
        "answer",
        DNS_ANSWER,
        "What lookups of addresses are answered with: what the upstream says, or an address of its own for each \
         name, so that nothing is looked up before a connection is allowed.",
    ),
]);

/// One of `tests`.
pub(crate) static TEST: Table = table(&[
    key(
        "name",
        Shape::Text,
        "Its name in messages; tests[N] (from 0) if left out.",
    ),
    key(
        "vm",
        Shape::Map(&SELECTOR),
        "The VM that asks; one that appliesTo claims if left out.",
    ),
    key(
        "allow",
        Shape::Some(&Shape::Text),
        "Destinations that must be let through, as \"tcp example.com:443\".",
    ),
    key(
        "deny",
        Shape::Some(&Shape::Text),
        "Destinations that must be refused.",
    ),
    key(
        "ask",
        Shape::Some(&Shape::Text),
        "Destinations that a person must be asked about.",
    ),
]);
