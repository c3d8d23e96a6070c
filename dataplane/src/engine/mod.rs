//! One guest as a sans-I/O state machine.
//!
//! The driver brings time, frames, verdicts and what its sockets did; the engine answers with frames
//! towards the guest ([`Engine::transmit`]), with [`Event`]s for the sockets, and with reports for the
//! session. It evaluates no policy: what its cache does not answer is a miss.
//!
//! The life of a frame, top to bottom, is [`Engine::handle_frame`]:
//!
//! 1. parse ([`frame`]); what cannot be delivered is counted by its [`DropReason`]
//! 2. check that the sender's addresses are its own
//! 3. the gateway's own answers (ARP, DHCP, DNS, echo), or another guest, or
//! 4. the flow table: an established flow costs one look-up and no allocation
//! 5. the verdict cache: a new flow that it covers is dialled or refused at once
//! 6. a miss: the packet is held, the session asks
//!
//! Payload is never copied through a channel: for TCP the driver borrows the connection's rings, and a
//! datagram is lent from the frame it came in.

pub mod bindings;
pub mod cache;
mod datagram;
pub mod flow;
mod fragment;
pub mod frame;
pub mod gateway;
pub mod held;
mod inbound;
pub mod inspect;
mod lookup;
pub mod reply;
pub mod ring;
pub mod stack;
mod tally;
pub mod tcp;
mod timer;
pub mod transmit;
mod verdict;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::Ipv4Net;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use vnet_proto::model::{
    FlowKey, FlowSubject, Guard, GuardSet, Protocol, Reason, Subject, VerdictAction, VmId,
};

use crate::engine::bindings::Bindings;
use crate::engine::cache::{Cache, Decision};
use crate::engine::flow::{Flow, FlowTable, State};
use crate::engine::fragment::Fragments;
use crate::engine::frame::{Body, DropReason, Frame};
use crate::engine::gateway::dhcp::DhcpOutcome;
use crate::engine::gateway::dns::Dns;
use crate::engine::held::{Held, Target};
use crate::engine::ring::RingPool;
use crate::engine::tally::Tally;
use crate::engine::timer::{Timer, Timers};
use crate::engine::transmit::Transmit;
use crate::mac::Mac;
use crate::message::{FlowEnd, FlowOpened, Report, Settings, VmStatus, flow_id};

/// Time since the engine started, on a clock that counts suspended time.
pub type Time = Duration;

/// How often counts, refusals and status are reported, when they changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Addresses one link may bind.
const ADDRESSES_MAX: usize = 16;
/// How long a UDP association lives without a packet (RFC 4787 REQ-5: at least two minutes).
pub const UDP_IDLE: Duration = Duration::from_secs(120);
/// The same where only the guest has spoken yet.
pub const UDP_UNANSWERED_IDLE: Duration = Duration::from_secs(30);
/// How long an echo session lives without a packet (RFC 5508 REQ-2: at least 60 s).
pub const ECHO_IDLE: Duration = Duration::from_secs(60);
/// UDP associations of one VM at once; the longest idle goes first.
pub const UDP_FLOWS_MAX: usize = 4_096;
/// Echo sessions of one VM at once.
pub const ECHO_FLOWS_MAX: usize = 256;

/// What an engine is made with.
#[derive(Clone)]
pub struct EngineConfig {
    /// The guest's handle.
    pub vm: VmId,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// The guests' subnet.
    pub subnet: Ipv4Net,
    /// The address that stands for the host's loopback, if any.
    pub host_alias: Option<Ipv4Addr>,
    /// Largest IP packet towards the guest, bytes.
    pub mtu_bytes: usize,
    /// The only MAC address that the link may have, if it is pinned.
    pub pinned_mac: Option<Mac>,
    /// Flows at once.
    pub flows_max: usize,
    /// How long a flow is held when nothing else is said.
    pub hold: Duration,
    /// How long lookups are held.
    pub lookup_hold: Duration,
    /// 32 random bytes.
    pub seed: [u8; 32],
}

/// What guests of one network share, as one guest's engine sees it.
pub trait Surroundings: Send + Sync {
    /// Whether `address` is this guest's from now on: it was free, or its own already.
    fn claim(&self, vm: VmId, mac: Mac, address: Ipv4Addr, now: Time) -> bool;
    /// Whether `mac` is this guest's from now on: no other guest has it.
    fn learn_mac(&self, vm: VmId, mac: Mac) -> bool;
    /// Answers a DHCP message.
    fn dhcp(&self, vm: VmId, mac: Mac, message: &[u8], now: Time) -> DhcpOutcome;
    /// The guest that owns an address of the subnet.
    fn guest_at(&self, address: IpAddr) -> Option<VmId>;
    /// The guards that a destination is under, judged on what would really be dialled.
    fn guards(&self, dialled: SocketAddr, protocol: Protocol) -> GuardSet;
    /// The local zones.
    fn zones(&self) -> Arc<crate::engine::gateway::dns::zones::Zones>;
}

/// What the driver does next with a frame just handled.
pub enum Outcome<'a> {
    /// Nothing.
    Done,
    /// Send a datagram on a UDP flow's host socket, opening it if it is not.
    Datagram {
        /// The flow's place.
        flow: usize,
        /// The payload.
        payload: &'a [u8],
    },
    /// Send an ICMP echo message on an echo flow's host socket, opening it if it is not.
    Echo {
        /// The flow's place.
        flow: usize,
        /// The message, header included.
        message: &'a [u8],
    },
    /// As [`Outcome::Datagram`] or [`Outcome::Echo`], from fragments put together.
    Assembled {
        /// The flow's place.
        flow: usize,
        /// The payload or message.
        payload: Vec<u8>,
    },
    /// Pass the frame to other guests.
    Switch(Mac),
}

/// What the driver's sockets are to do.
#[derive(Debug)]
pub enum Event {
    /// Dial a TCP flow's host side, then say [`Engine::handle_dialled`] or [`Engine::handle_refused`].
    Dial {
        /// The flow's place.
        flow: usize,
        /// Where to.
        to: SocketAddr,
    },
    /// Send these on a UDP or echo flow's host socket, opening it if it is not.
    Send {
        /// The flow's place.
        flow: usize,
        /// Payloads or messages, oldest first.
        packets: Vec<Box<[u8]>>,
    },
    /// Close a flow's host socket; its place may be taken again right after.
    Close {
        /// The flow's place.
        flow: usize,
        /// With RST.
        reset: bool,
    },
    /// Ask an upstream resolver, then say [`Engine::handle_resolved`].
    Resolve {
        /// Number of the query.
        query: u64,
        /// The message.
        bytes: Vec<u8>,
    },
    /// Tell the session.
    Report(Box<Report>),
}

/// One guest.
pub struct Engine {
    config: EngineConfig,
    surroundings: Arc<dyn Surroundings>,
    settings: Settings,
    /// Frames towards the guest.
    pub transmit: Transmit,
    events: VecDeque<Event>,
    timers: Timers,
    flows: FlowTable,
    next_flow: u64,
    udp_flows: usize,
    echo_flows: usize,
    next_ingress_port: u16,
    dirty: Vec<usize>,
    touched: Vec<usize>,
    cache: Cache,
    held: Held,
    tally: Tally,
    bindings: Bindings,
    dns: Dns,
    /// When the timers of the two above are set to fire.
    dns_set: Option<Time>,
    bindings_set: Option<Time>,
    fragments: Fragments,
    rings: RingPool,
    random: StdRng,
    mac: Option<Mac>,
    addresses: Vec<Ipv4Addr>,
    claimed_hostname: String,
    status_changed: bool,
    /// The latest time that anybody told it.
    clock: Time,
    report_set: bool,
    drops: [u64; DropReason::ALL.len()],
}

impl Engine {
    /// A guest that has said nothing yet.
    pub fn new(config: EngineConfig, surroundings: Arc<dyn Surroundings>, name: String) -> Self {
        let settings = Settings {
            name,
            switch_open: false,
            forwards_closed: false,
            lookup_hold: config.lookup_hold,
            hold: config.hold,
        };
        Self {
            transmit: Transmit::new(config.gateway_mac),
            events: VecDeque::new(),
            timers: Timers::default(),
            flows: FlowTable::new(config.flows_max),
            next_flow: 1,
            udp_flows: 0,
            echo_flows: 0,
            next_ingress_port: 0,
            dirty: Vec::new(),
            touched: Vec::new(),
            cache: Cache::default(),
            held: Held::new(config.vm, config.hold),
            tally: Tally::default(),
            bindings: Bindings::default(),
            dns: Dns::new(config.lookup_hold),
            dns_set: None,
            bindings_set: None,
            fragments: Fragments::default(),
            rings: RingPool::default(),
            random: StdRng::from_seed(config.seed),
            mac: config.pinned_mac,
            addresses: Vec::new(),
            claimed_hostname: String::new(),
            status_changed: false,
            clock: Time::ZERO,
            report_set: false,
            drops: [0; DropReason::ALL.len()],
            settings,
            config,
            surroundings,
        }
    }

    /// Takes a frame from the guest.
    pub fn handle_frame<'a>(&mut self, now: Time, bytes: &'a [u8]) -> Outcome<'a> {
        self.clock = now;
        match self.try_frame(now, bytes) {
            Ok(outcome) => outcome,
            Err(reason) => {
                self.count_drop(reason);
                Outcome::Done
            }
        }
    }

    fn try_frame<'a>(&mut self, now: Time, bytes: &'a [u8]) -> Result<Outcome<'a>, DropReason> {
        let frame = Frame::parse(bytes)?;
        self.check_station(frame.source)?;
        match frame.body {
            Body::Arp(arp) => self.handle_arp(now, &frame, &arp),
            // Not carried on the guest's side yet; never passed on either, so that it goes round nothing.
            Body::Ipv6(_) => Err(DropReason::Ipv6),
            Body::Ipv4(ip) => {
                if self.is_dhcp(&ip) {
                    self.handle_dhcp(now, frame.source, &ip);
                    return Ok(Outcome::Done);
                }
                self.check_source(now, frame.source, ip.source)?;
                if frame.destination != self.config.gateway_mac {
                    return self.switch(&frame);
                }
                self.handle_ipv4(now, ip)
            }
        }
    }

    /// The first MAC address of a link is the link's; any other is somebody's who it is not.
    fn check_station(&mut self, source: Mac) -> Result<(), DropReason> {
        match self.mac {
            Some(mac) if mac == source => {}
            None if source.is_unicast()
                && source != self.config.gateway_mac
                && self.surroundings.learn_mac(self.config.vm, source) =>
            {
                self.mac = Some(source);
                self.note_status();
            }
            _ => return Err(DropReason::SpoofedMac),
        }
        self.transmit.guest = source;
        Ok(())
    }

    /// An address is the guest's when it has it already, or it is free: first come, first served.
    fn check_source(&mut self, now: Time, mac: Mac, source: Ipv4Addr) -> Result<(), DropReason> {
        if self.addresses.contains(&source) {
            return Ok(());
        }
        if !self.is_guest_address(source) {
            return Err(DropReason::SpoofedAddress);
        }
        if self.addresses.len() >= ADDRESSES_MAX {
            return Err(DropReason::AddressLimit);
        }
        if !self.surroundings.claim(self.config.vm, mac, source, now) {
            return Err(DropReason::SpoofedAddress);
        }
        self.bind_address(source);
        Ok(())
    }

    fn bind_address(&mut self, address: Ipv4Addr) {
        if !self.addresses.contains(&address) {
            self.addresses.push(address);
            self.note_status();
        }
    }

    /// Whether an address may be a guest's at all.
    fn is_guest_address(&self, address: Ipv4Addr) -> bool {
        let subnet = &self.config.subnet;
        subnet.contains(&address)
            && address != subnet.network()
            && address != subnet.broadcast()
            && address != self.config.gateway
            && Some(address) != self.config.host_alias
    }

    /// Frames to other guests, where the switch is open. The network decides whether theirs is too.
    fn switch<'a>(&mut self, frame: &Frame<'a>) -> Result<Outcome<'a>, DropReason> {
        if !self.settings.switch_open {
            return Err(DropReason::GuestToGuest);
        }
        if let Body::Ipv4(ip) = frame.body
            && inbound::is_dhcp_answer(&ip)
        {
            return Err(DropReason::RogueDhcp);
        }
        Ok(Outcome::Switch(frame.destination))
    }

    /// What a guest-visible destination is dialled as.
    fn dialled(&self, peer: SocketAddr) -> SocketAddr {
        match (peer.ip(), self.config.host_alias) {
            (IpAddr::V4(v4), Some(alias)) if v4 == alias => {
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), peer.port())
            }
            _ => peer,
        }
    }

    /// Whether a flow may go there at all.
    fn check_destination(&self, address: Ipv4Addr) -> Result<(), DropReason> {
        if Some(address) == self.config.host_alias {
            return Ok(());
        }
        if self.config.subnet.contains(&address) {
            return Err(match self.surroundings.guest_at(address.into()) {
                Some(_) => DropReason::GuestToGuest,
                None => DropReason::UnknownStation,
            });
        }
        let first = address.octets()[0];
        if first == 0 || address.is_loopback() || first >= 224 {
            return Err(DropReason::Destination);
        }
        Ok(())
    }

    /// The cache's answer for a new flow; `None` is a miss.
    fn decide(&self, now: Time, key: &FlowKey, dialled: SocketAddr) -> Option<Arc<Decision>> {
        let guards = self.surroundings.guards(dialled, key.protocol);
        if guards.contains(Guard::Daemon) {
            return Some(Arc::new(Decision {
                action: VerdictAction::Deny,
                epoch: self.cache.epoch().unwrap_or(vnet_proto::model::Epoch {
                    incarnation: 0,
                    counter: 0,
                }),
                expires_at: None,
                grant: String::new(),
                reason: Reason::new("guard", "daemon", "a vnet daemon listens there; nothing opens it"),
                would_deny: false,
                guards,
            }));
        }
        self.cache.lookup(now, key, guards).cloned()
    }

    /// The evidence about a flow.
    fn subject(&mut self, now: Time, key: &FlowKey, dialled: SocketAddr) -> FlowSubject {
        let mut guards = self.surroundings.guards(dialled, key.protocol);
        let bound = self.bindings.names_of(now, key.peer.ip());
        if !bound.is_empty() && bindings::is_private_or_special(key.peer.ip()) {
            guards = guards.with(Guard::PrivateFromDns);
        }
        FlowSubject {
            key: *key,
            dialled: dialled.ip(),
            names: bound,
            guards,
            peer_vm: None,
        }
    }

    fn new_flow(&mut self, now: Time, key: FlowKey, dialled: SocketAddr, state: State) -> usize {
        let id = flow_id(self.config.vm, self.next_flow);
        self.next_flow += 1;
        match state {
            State::Udp => self.udp_flows += 1,
            State::Echo => self.echo_flows += 1,
            _ => {}
        }
        self.flows.insert(Flow {
            id,
            key,
            dialled,
            ingress: false,
            state,
            decision: None,
            last_active: now,
            opened_at: SystemTime::now(),
            bytes_up: 0,
            bytes_down: 0,
            scheduled: None,
            dirty: false,
            touched: false,
        })
    }

    /// A flow was let through: tell the session.
    fn report_opened(&mut self, now: Time, at: usize, miss: Option<vnet_proto::model::MissId>) {
        let Some(flow) = self.flows.get(at) else { return };
        let (key, dialled, ingress) = (flow.key, flow.dialled, flow.ingress);
        let subject = self.subject(now, &key, dialled);
        let Some(flow) = self.flows.get(at) else { return };
        let decision = flow.decision.as_deref();
        let opened = FlowOpened {
            flow: flow.id,
            vm: self.config.vm,
            ingress,
            subject,
            epoch: decision.map(|d| d.epoch),
            grant: decision.map(|d| d.grant.clone()).unwrap_or_default(),
            reason: decision.map_or_else(
                || Reason::new("forward", "", "a port forward leads here"),
                |d| d.reason.clone(),
            ),
            would_deny: decision.is_some_and(|d| d.would_deny),
            opened_at: flow.opened_at,
            miss,
        };
        self.report(Report::FlowOpened(opened));
    }

    /// Ends a flow: out of the table, its host socket closed, the session told. What the guest still
    /// has to see must be queued before.
    fn end_flow(&mut self, at: usize, end: FlowEnd) {
        let Some(flow) = self.flows.remove(at) else { return };
        match &flow.state {
            State::Udp => self.udp_flows -= 1,
            State::Echo => self.echo_flows -= 1,
            State::Held(waiting) => {
                let miss = waiting.miss;
                if self.held.leave(miss, at) {
                    let end = match end {
                        FlowEnd::GuestReset => crate::message::MissEnd::GuestGaveUp,
                        FlowEnd::VmDown => crate::message::MissEnd::VmDown,
                        FlowEnd::Evicted => crate::message::MissEnd::Evicted,
                        _ => crate::message::MissEnd::HoldExpired,
                    };
                    self.report(Report::MissEnded { miss, end });
                }
                self.flows.release(at);
                return;
            }
            State::Service(_) => {
                self.flows.release(at);
                self.close_dns(flow.id.0);
                return;
            }
            State::Dialing { .. } | State::Tcp(_) => {}
        }
        let reset = !matches!(end, FlowEnd::Finished | FlowEnd::Idle);
        self.events.push_back(Event::Close { flow: at, reset });
        self.report(Report::FlowClosed {
            flow: flow.id,
            end,
            bytes_up: flow.bytes_up,
            bytes_down: flow.bytes_down,
        });
    }

    fn report(&mut self, report: Report) {
        self.events.push_back(Event::Report(Box::new(report)));
    }

    /// Counts a decision that the cache made, for the next report.
    fn tally(&mut self, now: Time, key: &FlowKey, dialled: SocketAddr, decision: &Arc<Decision>) {
        let mut tally = std::mem::take(&mut self.tally);
        tally.count(Target::from(key), decision, || {
            Subject::Flow(self.subject(now, key, dialled))
        });
        self.tally = tally;
        self.want_report(now);
    }

    fn want_report(&mut self, now: Time) {
        if !self.report_set {
            self.report_set = true;
            self.timers.set(now + REPORT_INTERVAL, Timer::Report);
        }
    }

    /// Counts bytes that passed on a flow.
    pub fn count_bytes(&mut self, now: Time, at: usize, up: usize, down: usize) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        flow.last_active = now;
        flow.bytes_up += up as u64;
        flow.bytes_down += down as u64;
        if !std::mem::replace(&mut flow.touched, true) {
            self.touched.push(at);
            self.want_report(now);
        }
    }

    fn mark_dirty(&mut self, at: usize) {
        if let Some(flow) = self.flows.get_mut(at)
            && !std::mem::replace(&mut flow.dirty, true)
        {
            self.dirty.push(at);
        }
    }

    /// Flows that a frame or timer has given something to do, once each.
    pub fn take_dirty(&mut self, into: &mut Vec<usize>) {
        for at in self.dirty.drain(..) {
            if let Some(flow) = self.flows.get_mut(at) {
                flow.dirty = false;
                into.push(at);
            }
        }
    }

    /// Whether a flow waits to be serviced.
    pub fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// A flow by its place.
    pub fn flow(&self, at: usize) -> Option<&Flow> {
        self.flows.get(at)
    }

    /// Live flows, held ones included.
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// Takes the next event. The place of a [`Event::Close`] is free from then on: act on it at once.
    pub fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        if let Event::Close { flow, .. } = event {
            self.flows.release(flow);
        }
        Some(event)
    }

    /// Events not yet taken.
    pub fn events_waiting(&self) -> usize {
        self.events.len()
    }

    /// When [`Self::handle_timeout`] is wanted next.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.next()
    }

    /// Does what is due. Spurious calls are harmless.
    pub fn handle_timeout(&mut self, now: Time) {
        self.clock = now;
        while let Some(timer) = self.timers.due(now) {
            match timer {
                Timer::Flow(at) => self.handle_flow_timeout(now, at),
                Timer::Report => self.handle_report_timeout(),
                Timer::Dns => self.handle_dns_timeout(now),
                Timer::Bindings => self.handle_bindings_timeout(now),
            }
        }
    }

    fn handle_report_timeout(&mut self) {
        self.report_set = false;
        let mut counts = Vec::with_capacity(self.touched.len());
        for at in std::mem::take(&mut self.touched) {
            if let Some(flow) = self.flows.get_mut(at)
                && std::mem::replace(&mut flow.touched, false)
            {
                counts.push((flow.id, flow.bytes_up, flow.bytes_down));
            }
        }
        if !counts.is_empty() {
            self.report(Report::FlowStats(counts));
        }
        for report in self.tally.take(self.config.vm) {
            self.report(report);
        }
        if std::mem::take(&mut self.status_changed) {
            self.report_status(true);
        }
    }

    /// Reports the guest's status as it is now.
    pub fn report_status(&mut self, attached: bool) {
        let dropped_frames: BTreeMap<String, u64> = DropReason::ALL
            .into_iter()
            .map(|reason| (reason.word().to_owned(), self.drops[reason as usize]))
            .filter(|(_, count)| *count != 0)
            .collect();
        self.report(Report::VmStatus(VmStatus {
            vm: self.config.vm,
            addresses: self.addresses.iter().copied().map(IpAddr::V4).collect(),
            mac: self.mac.map(|m| m.to_string()).unwrap_or_default(),
            claimed_hostname: self.claimed_hostname.clone(),
            dropped_frames,
            attached,
        }));
    }

    /// Counts a frame that was not delivered.
    pub fn count_drop(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
        self.note_status();
    }

    /// Something about the guest changed: say so with the next report.
    fn note_status(&mut self) {
        self.status_changed = true;
        self.want_report(self.clock);
    }

    /// Frames not delivered, by reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// The guest's MAC address, once it has shown one.
    pub fn mac(&self) -> Option<Mac> {
        self.mac
    }

    /// Whether other guests' frames may come in.
    pub fn switch_open(&self) -> bool {
        self.settings.switch_open
    }

    /// Ends everything: the link is gone for good.
    pub fn handle_link_down(&mut self) {
        for at in self.flows.places() {
            self.end_flow(at, FlowEnd::VmDown);
        }
    }
}
