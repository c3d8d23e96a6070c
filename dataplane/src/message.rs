//! What passes between a guest's driver and the rest of its dataplane, off the packet path.
//!
//! Drivers send [`Report`]s towards the session; the session and the network send [`Input`]s back.
//! Both are plain values of the checked model: no generated type, no payload of a flow.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use vnet_proto::model::{
    Budget, CommandId, Epoch, FlowId, FlowSubject, ForwardListen, GuardSet, Match, Miss, MissId, Mode, Name,
    Protocol, Reason, Subject, Verdict, VerdictAction, VmId,
};

use crate::egress::stream::HostStream;
use crate::link::Link;

/// Bits of a [`MissId`] or [`FlowId`] that count within one guest; those above are its [`VmId`].
pub const SEQUENCE_BITS: u32 = 40;

/// The `sequence`-th miss of a guest. Sequence numbers wrap after 2^40, which no guest lives to see.
pub fn miss_id(vm: VmId, sequence: u64) -> MissId {
    MissId(numbered(vm, sequence))
}

/// The `sequence`-th flow of a guest.
pub fn flow_id(vm: VmId, sequence: u64) -> FlowId {
    FlowId(numbered(vm, sequence))
}

/// The guest that a miss belongs to. An id made up by the other side names a guest that does not
/// exist, or one that does not know it; both ignore it.
pub fn vm_of_miss(miss: MissId) -> VmId {
    VmId((miss.0 >> SEQUENCE_BITS) as u32)
}

/// The guest that a flow belongs to.
pub fn vm_of_flow(flow: FlowId) -> VmId {
    VmId((flow.0 >> SEQUENCE_BITS) as u32)
}

fn numbered(vm: VmId, sequence: u64) -> u64 {
    u64::from(vm.0) << SEQUENCE_BITS | sequence & ((1 << SEQUENCE_BITS) - 1)
}

/// Hands inputs to guests' drivers. Implemented by the network; used by the session, by forwards and by
/// whatever watches the host's addresses. No call waits for a driver.
pub trait Router: Send + Sync {
    /// Hands an input to one guest; `false` when there is no such guest, and the input is gone.
    fn send(&self, vm: VmId, input: Input) -> bool;

    /// Hands an order to every guest there is now, and says which those are. A guest that is not in
    /// the answer was not there; it starts with an empty cache.
    fn broadcast(&self, order: &Order) -> Vec<VmId>;

    /// The guests there are now.
    fn vms(&self) -> Vec<VmId>;

    /// The guest whose link an address of the network is bound to.
    fn guest_at(&self, address: IpAddr) -> Option<VmId>;

    /// Asks the guests that there are whose an address is; false where it can be none's, or there is nobody to ask.
    fn seek(&self, address: IpAddr) -> bool;

    /// Whether every guest there is reaches every other: none is under a policy or a mode. One of which that is not
    /// known yet is.
    fn is_open(&self) -> bool;
}

/// A port or a Unix socket of the host that leads into a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Forward {
    /// [`Protocol::Tcp`] or [`Protocol::Udp`]; of a Unix socket, TCP.
    pub protocol: Protocol,
    /// Where on the host.
    pub listen: ForwardListen,
    /// Address and port in the network.
    pub target: SocketAddr,
    /// The guest sees clients by their own addresses, where that can be, rather than as the gateway.
    pub keep_client: bool,
    /// The VM that asked for it itself; empty: somebody else opened it. This and the next are the controlplane's, and
    /// are kept for it.
    pub asked_by: String,
    /// The grant that it rests on; empty: none.
    pub grant_id: String,
}

impl Forward {
    /// The same, so many ports further on both sides; `None` where there is no such port.
    pub fn further(&self, ports: u16) -> Option<Self> {
        let mut target = self.target;
        target.set_port(target.port().checked_add(ports)?);
        Some(Self {
            listen: self.listen.further(ports)?,
            target,
            ..self.clone()
        })
    }
}

/// A forward, told from all others that this dataplane has or had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ForwardId(pub u64);

/// From a guest's driver to the session. The session mirrors what a reconnect must say again: VMs,
/// held misses, live flows.
#[derive(Debug)]
pub enum Report {
    /// A guest attached.
    VmUp(VmUp),
    /// Something about a guest changed.
    VmStatus(VmStatus),
    /// A guest's link is gone for good; its misses and flows are gone with it.
    VmDown {
        /// Which.
        vm: VmId,
        /// What failed, where the hypervisor did not simply close it.
        link_error: Option<String>,
    },
    /// The cache does not answer this.
    Miss(Miss),
    /// A miss no longer waits.
    MissEnded {
        /// Which.
        miss: MissId,
        /// Why.
        end: MissEnd,
    },
    /// A flow opened.
    FlowOpened(FlowOpened),
    /// A flow ended.
    FlowClosed {
        /// Which.
        flow: FlowId,
        /// Why.
        end: FlowEnd,
        /// Bytes from the guest.
        bytes_up: u64,
        /// Bytes to the guest.
        bytes_down: u64,
        /// Of [`FlowEnd::NameRefused`]: why.
        refusal: Option<Box<NameRefusal>>,
    },
    /// Counts of live flows that changed: flow, bytes up, bytes down, each in all.
    FlowStats(Vec<(FlowId, u64, u64)>),
    /// Flows or lookups were answered without a miss of their own.
    Decided {
        /// Whose.
        vm: VmId,
        /// What.
        subject: Subject,
        /// What was done.
        action: VerdictAction,
        /// Why.
        reason: Reason,
        /// How many since the last such report.
        count: u64,
        /// Observe mode let through what would have been denied.
        would_deny: bool,
    },
    /// What a guest has used of grants with budgets, each in all.
    Uses {
        /// Whose.
        vm: VmId,
        /// Grants, and what was used.
        uses: Vec<(String, Budget)>,
    },
    /// A lookup taught addresses.
    Binding {
        /// Whose.
        vm: VmId,
        /// The name that was asked for.
        name: Name,
        /// What it stands for.
        addresses: Vec<IpAddr>,
        /// For how long.
        expires_in: Duration,
    },
    /// A limit that a policy sets refused something.
    LimitReached {
        /// Whose.
        vm: VmId,
        /// The policy's key.
        limit: &'static str,
        /// A registrable domain; empty for the VM as a whole.
        subject: String,
        /// What the limit is.
        value: u32,
        /// How much was refused since the last such report.
        count: u64,
    },
    /// A Revoke, a Cut or the closing of a forward is done in this guest. The session acknowledges when every
    /// guest has said so.
    Done {
        /// Which guest.
        vm: VmId,
        /// Which command.
        command: CommandId,
        /// Flows that it cut here.
        cut: u64,
    },
    /// What the cache of verdicts holds, as it was asked for.
    Verdicts {
        /// Which guest's.
        vm: VmId,
        /// Which command asked.
        command: CommandId,
        /// What is cached, flows before lookups, up to a limit.
        verdicts: Vec<CachedVerdict>,
        /// How much is.
        in_all: usize,
    },
    /// The host's own addresses changed; the whole list, loopback aside.
    HostAddresses(Vec<IpAddr>),
    /// The dataplane ends. The session goes on until the guests have said that they are gone, a moment
    /// at most.
    End,
}

/// A guest attached.
#[derive(Debug, Clone, PartialEq)]
pub struct VmUp {
    /// Its handle.
    pub vm: VmId,
    /// The name it should go by.
    pub name: String,
    /// Labels, from the host's side.
    pub labels: BTreeMap<String, String>,
    /// `qemu`, `vfkit`, `tap` ...
    pub transport: &'static str,
    /// The policy it brought along.
    pub own_policy: Option<OwnPolicy>,
    /// The mode it brought along.
    pub mode: Option<Mode>,
    /// Whether 169.254.0.0/16 is open to it.
    pub ec2_metadata_access: bool,
    /// How long its resolver waits.
    pub resolver_patience: Duration,
    /// When it attached.
    pub attached_at: SystemTime,
}

/// A policy that a VM brings along, as text; the dataplane does not read it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnPolicy {
    /// The YAML document, if there is one.
    pub document: Option<String>,
    /// Where it came from.
    pub source: String,
    /// Rules placed before the document's, as `allow tcp 10.0.0.1:80`.
    pub rules: Vec<String>,
    /// The lists that the document names, shared by all VMs that bring it.
    pub lists: Arc<[OwnList]>,
}

/// A list that a policy names, as it travels; the dataplane does not read it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnList {
    /// Its path, as the document writes it.
    pub path: String,
    /// Its content's digest.
    pub sha256: String,
    /// Its content, compressed.
    pub content: Vec<u8>,
    /// Bytes of its content.
    pub size_bytes: u64,
}

/// What changes about an attached guest.
#[derive(Debug, Clone, PartialEq)]
pub struct VmStatus {
    /// Its handle.
    pub vm: VmId,
    /// Addresses bound to its link.
    pub addresses: Vec<IpAddr>,
    /// Its MAC address, as it claims; text.
    pub mac: String,
    /// Its DHCP host name, as it claims.
    pub claimed_hostname: String,
    /// The address that DHCP gave to it.
    pub leased_address: Option<Ipv4Addr>,
    /// Frames not delivered so far, by drop reason.
    pub dropped_frames: BTreeMap<String, u64>,
    /// What else is counted of it, and of its network, by name.
    pub counters: BTreeMap<String, u64>,
    /// Whether its link is there.
    pub attached: bool,
}

/// A verdict as the cache keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedVerdict {
    /// What is done.
    pub action: VerdictAction,
    /// Where it holds.
    pub found: Match,
    /// When it was made.
    pub epoch: Epoch,
    /// Observe mode let through what would have been denied.
    pub would_deny: bool,
    /// The guards that a flow must be under for it, these and no others.
    pub guards: GuardSet,
    /// The other guest that the destination must belong to.
    pub neighbour: Option<VmId>,
    /// The grant that it rests on; empty for none.
    pub grant: String,
    /// Names bound to the destination, where they were looked at.
    pub names: Vec<Name>,
}

/// Why a miss no longer waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissEnd {
    /// Its deadline passed; the guest was refused.
    HoldExpired,
    /// The guest gave up.
    GuestGaveUp,
    /// The guest's link is gone.
    VmDown,
    /// A limit was reached.
    Evicted,
    /// Another verdict covered it.
    Covered,
}

/// A flow opened.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowOpened {
    /// Its id.
    pub flow: FlowId,
    /// Whose.
    pub vm: VmId,
    /// Opened from the host's side through a forward.
    pub ingress: bool,
    /// What it is. For ingress, `key.guest` is the guest and `key.peer` the client as the guest sees it.
    pub subject: FlowSubject,
    /// The epoch of the verdict behind it; `None` for ingress.
    pub epoch: Option<Epoch>,
    /// The grant it rests on; empty for none.
    pub grant: String,
    /// Why it was let through.
    pub reason: Reason,
    /// Observe mode let through what would have been denied.
    pub would_deny: bool,
    /// When.
    pub opened_at: SystemTime,
    /// The miss that it was; `None` for a hit.
    pub miss: Option<MissId>,
    /// The names of which it must, or may, speak one; empty where none is demanded.
    pub names: Vec<Name>,
}

/// Why a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowEnd {
    /// Both sides finished.
    Finished,
    /// The guest reset it.
    GuestReset,
    /// The other side reset it.
    HostReset,
    /// Nothing happened for its idle time.
    Idle,
    /// It was cut.
    Cut,
    /// The guest's link is gone.
    VmDown,
    /// It was evicted at a limit.
    Evicted,
    /// Its grant's expiry or budget ended it.
    GrantEnded,
    /// The destination refused it or could not be reached.
    Unreachable,
    /// The guest spoke another name than its verdict rests on, or none where one is required.
    NameRefused,
}

/// Why a flow was refused for its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameRefusal {
    /// A word of a closed set, that of the counter.
    pub word: &'static str,
    /// One sentence for people.
    pub text: String,
    /// The name that the guest spoke, where one could be read.
    pub spoken: Option<Name>,
    /// The names that it might have spoken.
    pub wanted: Vec<Name>,
}

/// From the session to every guest's driver, or to the one that a miss belongs to.
#[derive(Debug, Clone)]
pub enum Order {
    /// Answers a miss.
    Verdict(Box<Verdict>),
    /// A miss waits for a person, and may be held so long from now.
    Held {
        /// Which.
        miss: MissId,
        /// How long from now.
        hold: Duration,
    },
    /// Every verdict older than this epoch is void. Answer with [`Report::Done`].
    Revoke {
        /// `None` when it comes with a Welcome, and needs no answer.
        command: Option<CommandId>,
        /// The epoch in force.
        epoch: Epoch,
    },
    /// Cut these flows. Answer with [`Report::Done`].
    Cut {
        /// For the answer.
        command: CommandId,
        /// Which; unknown ones are ignored.
        flows: Vec<FlowId>,
    },
    /// Say what the cache of verdicts holds. Answer with [`Report::Verdicts`].
    ReportVerdicts {
        /// For the answer.
        command: CommandId,
    },
    /// Cached verdicts of this epoch hold for so long from now.
    Lease {
        /// The epoch in force.
        epoch: Epoch,
        /// How long from now.
        lease: Duration,
    },
    /// How much of a grant's budget this VM may use in all.
    Limit {
        /// The grant.
        grant: String,
        /// How much; `None`: the grant has ended, and need not be counted.
        limit: Option<Budget>,
    },
    /// How this VM is treated.
    Settings(Settings),
    /// Addresses that the host owns, or where daemons listen, changed: every cached verdict is void, and what goes
    /// where a daemon listens is cut.
    GuardsChanged,
    /// The host's way out over IPv6 came or went.
    WayChanged,
}

/// How a VM is treated, as far as the dataplane must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The name it goes by.
    pub name: String,
    /// Other guests may be reached by plain switching.
    pub switch_open: bool,
    /// Forwards into it are cut and refused.
    pub forwards_closed: bool,
    /// Its lookups of addresses are answered with synthetic ones.
    pub synthetic_answers: bool,
    /// How long its lookups may be held.
    pub lookup_hold: Duration,
    /// How long its flows may be held when nothing else is said.
    pub hold: Duration,
    /// How its lookups are answered and limited.
    pub dns: DnsSettings,
    /// How much longer than their lease cached allows that rest on no grant hold.
    pub loss_grace: Duration,
    /// A hello that hides its name is refused where a name is demanded; else the name that it shows counts.
    pub deny_ech: bool,
    /// QUIC is refused where a name is demanded, rather than read.
    pub deny_quic: bool,
    /// The controlplane judges the aliases in answers; else they pass unasked.
    pub judges_aliases: bool,
}

impl Settings {
    /// Of a guest of which the session has said nothing yet.
    pub fn unsaid(name: String, lookup_hold: Duration, hold: Duration) -> Self {
        Self {
            name,
            switch_open: false,
            forwards_closed: false,
            synthetic_answers: false,
            lookup_hold,
            hold,
            dns: DnsSettings::default(),
            loss_grace: Duration::ZERO,
            deny_ech: true,
            deny_quic: false,
            judges_aliases: false,
        }
    }
}

/// How a VM's lookups are answered and limited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsSettings {
    /// Times to live below this are raised to it.
    pub ttl_min: Duration,
    /// Times to live above this are cut to it.
    pub ttl_max: Duration,
    /// How a lookup that is denied is answered.
    pub deny_with: DnsDenial,
    /// The extended error's text then; empty for the denial's reason.
    pub deny_text: String,
    /// Lookups that may go upstream within a second; zero for any number.
    pub queries_per_second: u32,
    /// Lookups that may go upstream within a minute; zero for any number.
    pub queries_per_minute: u32,
    /// Different names of one registrable domain that may within a minute; zero for any number.
    pub names_per_domain: u32,
    /// What goes to port 53 of any other address than a guest's is answered by the gateway's own DNS.
    pub redirect: bool,
}

impl Default for DnsSettings {
    fn default() -> Self {
        Self {
            ttl_min: Duration::ZERO,
            ttl_max: DNS_TTL_MAX,
            deny_with: DnsDenial::default(),
            deny_text: String::new(),
            queries_per_second: 0,
            queries_per_minute: 0,
            names_per_domain: 0,
            redirect: false,
        }
    }
}

/// The longest time to live that a guest is told where nothing else is said: what it may remember, its
/// bindings remember as well.
pub const DNS_TTL_MAX: Duration = Duration::from_secs(3_600);

/// How a lookup that is denied is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DnsDenial {
    /// REFUSED.
    #[default]
    Refused,
    /// NXDOMAIN.
    NxDomain,
    /// SERVFAIL.
    ServFail,
}

/// One of a bounded number of things that wait to be taken on. Dropping it makes room for another.
#[derive(Debug, Default)]
pub struct Waiting(Option<Arc<AtomicUsize>>);

impl Waiting {
    /// Counts one more in `count`, unless `limit` wait already.
    pub fn enter(count: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        count
            .fetch_update(Relaxed, Relaxed, |waiting| {
                (waiting < limit).then_some(waiting + 1)
            })
            .ok()
            .map(|_| Self(Some(Arc::clone(count))))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(count) = &self.0 {
            count.fetch_sub(1, Relaxed);
        }
    }
}

/// A place in the session's queue of reports; `None` when the session is gone.
pub type Turn = Option<tokio::sync::mpsc::OwnedPermit<Report>>;

/// A connection from the host's side that leads into a guest.
#[derive(Debug)]
pub struct Ingress {
    /// The connection.
    pub stream: HostStream,
    /// What was read from it already; the guest gets it first.
    pub early: Vec<u8>,
    /// Where in the guest it leads.
    pub target: SocketAddr,
    /// Whom the guest is to see, where that can be; `None` for the gateway.
    pub client: Option<SocketAddr>,
    /// What it came through.
    pub origin: Origin,
    /// Counts as waiting until it is dropped; drop it when the connection is taken on or refused.
    pub waiting: Waiting,
}

/// What a connection from the host's side came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A forward: where the guest does not take it, its client sees a reset, as of a port that is closed.
    Forward(ForwardId),
    /// A tunnel, whose client was told already that there is one: it sees an ordinary end.
    Tunnel,
}

impl Origin {
    /// The forward, if it was one.
    pub fn forward(self) -> Option<ForwardId> {
        match self {
            Self::Forward(forward) => Some(forward),
            Self::Tunnel => None,
        }
    }
}

/// Everything that reaches a guest's driver from the rest of its dataplane.
#[derive(Debug)]
pub enum Input {
    /// From the session.
    Order(Order),
    /// An upstream DNS answer, or `None` when none could be had.
    Resolved {
        /// Which query, as the engine numbered it.
        query: u64,
        /// The whole message as the upstream sent it, with the id that was asked with.
        answer: Option<Vec<u8>>,
    },
    /// A connection from the host's side that leads into this guest.
    Ingress(Ingress),
    /// A UDP forward leads to this guest: its socket, non-blocking, to be read from now on.
    IngressUdp {
        /// The forward.
        forward: ForwardId,
        /// The socket.
        socket: std::net::UdpSocket,
        /// Where in the guest it leads.
        target: SocketAddr,
        /// The guest is to see its clients where that can be, rather than the gateway.
        keep_client: bool,
        /// Kept with the socket: while it is there, the guest is not handed another.
        held: Arc<()>,
    },
    /// Forwards are closed: cut their flows. Answer with [`Report::Done`].
    IngressClosed {
        /// For the answer.
        command: CommandId,
        /// Which.
        forwards: Arc<[ForwardId]>,
    },
    /// Another guest's engine ended a flow between the two.
    PermitClosed {
        /// Which.
        flow: FlowId,
        /// How it ended.
        end: FlowEnd,
    },
    /// Give up so many flows that have a descriptor of the host's: other guests have less than their share.
    MakeWay(usize),
    /// Another guest is gone.
    GuestGone(VmId),
    /// The session's queue has the place that this guest waits for.
    Turn(Turn),
    /// Show a capture this guest's frames from now on.
    Capture(crate::capture::Tap),
    /// The guest's hypervisor is back, over this link; some of its frames may have been read already.
    Link(Box<Link>),
    /// Send the guest something, so that a link without another side shows that it is over.
    TryLink,
    /// Ask the guest whether an address of the subnet is its own.
    Seek(Ipv4Addr),
    /// End the driver if no frame of its guest has come yet, as its place is another's then.
    LeaveIfSilent,
    /// End the driver; its link closes.
    Stop,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_carry_their_guest() {
        let vm = VmId(0x00ab_cdef);
        assert_eq!(vm_of_miss(miss_id(vm, 7)), vm);
        assert_eq!(vm_of_flow(flow_id(vm, (1 << SEQUENCE_BITS) - 1)), vm);
        assert!(miss_id(vm, 1) < miss_id(vm, 2), "ids of one guest grow");
    }

    #[test]
    fn a_sequence_that_wraps_stays_inside_its_guest() {
        let vm = VmId(3);
        assert_eq!(miss_id(vm, 1 << SEQUENCE_BITS), miss_id(vm, 0));
    }
}
