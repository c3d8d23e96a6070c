//! Every metric of the dataplane, registered in one place.
//!
//! Owns the counters and gauges of what happens off the packet path: the session, forwards, guards, and
//! what the guests of a network share (its addresses, the upstream resolver). What one guest's engine
//! counts (frames dropped by reason, what its gateway did) stays in that engine and reaches the
//! controlplane as the VM's status. All of them are logged when the dataplane ends. Names are plane, thing, unit; labels come from closed
//! sets, never an address or a name. [`Metrics::render`] writes the text exposition format.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts what only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn increment(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// At least so many: what is counted elsewhere is brought here.
    pub fn raise_to(&self, count: u64) {
        self.0.fetch_max(count, Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Holds what goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// The value is now this.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A closed set of label values.
pub trait Label: Copy + 'static {
    /// Every value, in order of declaration, so that `value as usize` is its place.
    const ALL: &'static [Self];

    /// The label's value in the exposition.
    fn name(self) -> &'static str;

    /// Its place in [`Self::ALL`].
    fn index(self) -> usize;
}

/// One counter for each value of a label.
#[derive(Debug)]
pub struct Family<L> {
    counters: Box<[Counter]>,
    label: std::marker::PhantomData<L>,
}

impl<L: Label> Default for Family<L> {
    fn default() -> Self {
        Self {
            counters: L::ALL.iter().map(|_| Counter::default()).collect(),
            label: std::marker::PhantomData,
        }
    }
}

impl<L: Label> Family<L> {
    /// The counter of one value.
    pub fn of(&self, value: L) -> &Counter {
        &self.counters[value.index()]
    }
}

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$value_doc])* $value,)* }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$value,)*];

            fn name(self) -> &'static str {
                match self { $(Self::$value => $text,)* }
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

labels! {
    /// Why a session ended.
    SessionEndCause {
        /// The stream or the connection broke, or the controlplane closed it.
        Lost = "lost",
        /// Three heartbeat intervals without a word.
        Silent = "silent",
        /// The controlplane broke the conversation's rules.
        Violation = "violation",
        /// It refused this dataplane.
        Refused = "refused",
        /// It could not be reached, or gave no Welcome in time.
        Unreachable = "unreachable",
    }
}

labels! {
    /// Why a message of the controlplane was not carried out.
    RefusedMessage {
        /// Malformed, or not one that may come now.
        Malformed = "malformed",
        /// A verdict of an epoch that is no longer in force.
        StaleVerdict = "stale_verdict",
        /// A verdict or word about a guest that is gone.
        NoSuchVm = "no_such_vm",
        /// A heartbeat of an epoch that is not in force; it renews nothing.
        StaleHeartbeat = "stale_heartbeat",
    }
}

labels! {
    /// A table of the session's mirror that was full.
    MirrorTable {
        /// Held misses: such a miss is not announced again after a reconnect.
        Misses = "misses",
        /// Live flows: such a flow is cut.
        Flows = "flows",
        /// Bindings: such a binding is not told again after a reconnect.
        Bindings = "bindings",
        /// Uses of budgets: such a use is not told again after a reconnect, but with its next change.
        Uses = "uses",
        /// Refusals kept while there is no session: the oldest is forgotten.
        Refusals = "refusals",
    }
}

labels! {
    /// Why a connection to a forward was closed at once.
    ForwardRefusal {
        /// No guest has the target's address.
        NoGuest = "no_guest",
        /// Too many new connections at once.
        Backlog = "backlog",
        /// It was closed while the connection waited.
        Closed = "closed",
        /// The host gave no descriptor or no memory for it.
        Accept = "accept",
    }
}

labels! {
    /// Why a connection was not handed over between front and dataplane.
    FrontRefusal {
        /// As many waited already as may, or its message was too long.
        Full = "full",
        /// The channel or its other side is gone, or the system refused.
        Send = "send",
        /// What came was no message, or not one for this side.
        Malformed = "malformed",
    }
}

labels! {
    /// Why a tunnel was not opened.
    TunnelRefusal {
        /// No guest has the address.
        NoGuest = "no_guest",
        /// Too many new ones at once.
        Backlog = "backlog",
        /// A guest came under a policy or a mode while it waited.
        Closed = "closed",
    }
}

labels! {
    /// Why a connection to `--listen` was not served.
    RequestRefusal {
        /// It spoke no HTTP, or spoke it wrong.
        Malformed = "malformed",
        /// Its head was longer than any may be.
        TooLong = "too_long",
        /// Its head was not whole in time.
        TooSlow = "too_slow",
        /// Others came while it had not said enough; of too many it had waited longest.
        Crowded = "crowded",
        /// A page in a browser asked for a link or a tunnel.
        Browser = "browser",
        /// Its tunnel has no address and port.
        Tunnel = "tunnel",
        /// Its tunnel would pass by the policy or mode of a guest.
        Policy = "policy",
        /// It asked for what nobody here serves.
        NotFound = "not_found",
        /// It could not be handed to the front.
        Front = "front",
        /// The host gave no descriptor or no memory for it.
        Accept = "accept",
    }
}

labels! {
    /// Why an address was not given to a guest, or taken from it.
    LeaseRefusal {
        /// No address was free to be offered.
        Exhausted = "exhausted",
        /// A guest found it in use and declined it.
        Declined = "declined",
        /// It is somebody else's, or nobody's to have.
        Claim = "claim",
        /// The same of an IPv6 address, or the network has as many as it may.
        ClaimIpv6 = "claim_ipv6",
        /// A limit of addresses was reached.
        Limit = "limit",
    }
}

labels! {
    /// What went wrong with a question to an upstream resolver.
    ResolverFault {
        /// Too many were under way.
        Busy = "busy",
        /// Nobody answered in time.
        Unanswered = "unanswered",
        /// A datagram answered another question than the one asked.
        Mismatched = "mismatched",
    }
}

labels! {
    /// Why somebody who came to a guest socket was not let in.
    LinkRefusal {
        /// As many guests or handshakes as one socket may have.
        Limit = "limit",
        /// A handshake that was none, or not whole in time.
        Handshake = "handshake",
        /// Datagrams from a socket without an address to answer to.
        Unnamed = "unnamed",
        /// It sent what is no frame before it was known whose it is.
        Unknown = "unknown",
        /// A further link of a VM that has one on that socket.
        Further = "further",
        /// The system had no descriptor, thread or memory for it.
        System = "system",
    }
}

macro_rules! metrics {
    ($($kind:ident $field:ident: $type:ty = $name:literal, $help:literal;)*) => {
        /// Every metric. Shared by reference; each is updated alone and without order.
        #[derive(Debug, Default)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: $type,)*
        }

        impl Metrics {
            /// The text exposition: help, type and value of every metric.
            pub fn render(&self) -> String {
                let mut out = String::new();
                $(render!($kind, self.$field, $name, $help, &mut out);)*
                out
            }
        }
    };
}

macro_rules! render {
    (counter, $metric:expr, $name:literal, $help:literal, $out:expr) => {
        render_one($out, $name, $help, "counter", $metric.get())
    };
    (gauge, $metric:expr, $name:literal, $help:literal, $out:expr) => {
        render_one($out, $name, $help, "gauge", $metric.get())
    };
    (by_cause, $metric:expr, $name:literal, $help:literal, $out:expr) => {
        render_family($out, $name, $help, "cause", &$metric)
    };
    (by_table, $metric:expr, $name:literal, $help:literal, $out:expr) => {
        render_family($out, $name, $help, "table", &$metric)
    };
}

metrics! {
    gauge session_up: Gauge = "vnet_dataplane_session_up", "1 while a controlplane's Welcome is in force.";
    counter session_welcomes: Counter = "vnet_dataplane_session_welcomes_total", "Sessions that were welcomed.";
    by_cause session_ends: Family<SessionEndCause> = "vnet_dataplane_session_ends_total", "Sessions and attempts that ended.";
    counter misses_sent: Counter = "vnet_dataplane_misses_sent_total", "Misses sent, those sent again included.";
    counter misses_reannounced: Counter = "vnet_dataplane_misses_reannounced_total", "Misses sent again after a reconnect or a stale verdict.";
    counter verdicts: Counter = "vnet_dataplane_verdicts_total", "Verdicts handed to guests.";
    counter messages_sent: Counter = "vnet_dataplane_session_messages_sent_total", "Messages to the controlplane.";
    counter messages_received: Counter = "vnet_dataplane_session_messages_received_total", "Messages from the controlplane.";
    by_cause messages_refused: Family<RefusedMessage> = "vnet_dataplane_session_messages_refused_total", "Messages of the controlplane that were not carried out.";
    by_table mirror_full: Family<MirrorTable> = "vnet_dataplane_mirror_full_total", "Entries that found a table of the session full.";
    gauge held_misses: Gauge = "vnet_dataplane_held_misses", "Misses that wait for an answer.";
    gauge live_flows: Gauge = "vnet_dataplane_live_flows", "Flows that are open.";
    gauge host_addresses: Gauge = "vnet_dataplane_host_addresses", "Addresses that the host owns, loopback aside.";
    counter guard_changes: Counter = "vnet_dataplane_guard_changes_total", "Changes of guarded addresses, each of which voids cached verdicts.";
    gauge forwards_open: Gauge = "vnet_dataplane_forwards_open", "Forwards that listen.";
    counter capture_dropped: Counter = "vnet_dataplane_capture_dropped_total", "Frames that captures lost, as they were not taken out in time.";
    counter forward_connections: Counter = "vnet_dataplane_forward_connections_total", "Connections that forwards handed to guests.";
    counter tunnels: Counter = "vnet_dataplane_tunnels_total", "Connections that tunnels handed to guests.";
    by_cause tunnel_refusals: Family<TunnelRefusal> = "vnet_dataplane_tunnel_refusals_total", "Tunnels that were not opened.";
    by_cause front_refusals: Family<FrontRefusal> = "vnet_dataplane_front_refusals_total", "Connections that were not handed over between front and dataplane.";
    counter requests: Counter = "vnet_dataplane_requests_total", "Connections to --listen.";
    by_cause request_refusals: Family<RequestRefusal> = "vnet_dataplane_request_refusals_total", "Connections to --listen that were not served.";
    by_cause lease_refusals: Family<LeaseRefusal> = "vnet_dataplane_lease_refusals_total", "Addresses that were not given to a guest, or taken from it.";
    counter resolver_questions: Counter = "vnet_dataplane_resolver_questions_total", "Questions asked of upstream resolvers.";
    counter resolver_over_tcp: Counter = "vnet_dataplane_resolver_over_tcp_total", "Questions asked again over TCP.";
    by_cause resolver_faults: Family<ResolverFault> = "vnet_dataplane_resolver_faults_total", "Questions to upstream resolvers that went wrong.";
    by_cause link_refusals: Family<LinkRefusal> = "vnet_dataplane_link_refusals_total", "Those who came to a guest socket and were not let in.";
    counter links_back: Counter = "vnet_dataplane_links_back_total", "Guests whose hypervisor's socket came back in time.";
    counter links_given_up: Counter = "vnet_dataplane_links_given_up_total", "Guests whose hypervisor's socket did not come back in time.";
    by_cause forward_refusals: Family<ForwardRefusal> = "vnet_dataplane_forward_refusals_total", "Connections that forwards closed at once.";
}

fn render_one(out: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
}

fn render_family<L: Label>(out: &mut String, name: &str, help: &str, label: &str, family: &Family<L>) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter");
    for value in L::ALL {
        let _ = writeln!(
            out,
            "{name}{{{label}=\"{}\"}} {}",
            value.name(),
            family.of(*value).get()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dump_shows_every_value_of_a_label_also_at_zero() {
        let metrics = Metrics::default();
        metrics.session_ends.of(SessionEndCause::Silent).add(3);
        metrics.session_up.set(1);

        let text = metrics.render();

        assert!(
            text.contains("# TYPE vnet_dataplane_session_up gauge\nvnet_dataplane_session_up 1\n"),
            "{text}"
        );
        assert!(
            text.contains("vnet_dataplane_session_ends_total{cause=\"silent\"} 3\n"),
            "{text}"
        );
        assert!(
            text.contains("vnet_dataplane_session_ends_total{cause=\"lost\"} 0\n"),
            "{text}"
        );
    }

    #[test]
    fn every_metric_is_named_for_its_plane_and_once() {
        let text = Metrics::default().render();
        let mut names: Vec<&str> = text
            .lines()
            .filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        assert!(names.iter().all(|n| n.starts_with("vnet_dataplane_")));
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
