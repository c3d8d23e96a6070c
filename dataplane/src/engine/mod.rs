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
//! 3. the gateway's own answers (ARP, neighbour discovery, DHCP, DNS, echo), or another guest's by plain
//!    switching ([`switch`]), or
//! 4. the flow table: an established flow costs one look-up and no allocation
//! 5. the verdict cache: a new flow that it covers is dialled or refused at once
//! 6. a miss: the packet is held, the session asks
//!
//! Payload is never copied through a channel: for TCP the driver borrows the connection's rings, and a
//! datagram is lent from the frame it came in.

pub mod aliases;
pub mod bindings;
pub mod budget;
pub mod cache;
mod counters;
mod datagram;
pub mod discovery;
pub mod flow;
mod fragment;
pub mod frame;
pub mod gateway;
pub mod guest_api;
pub mod held;
mod idle;
mod inbound;
mod ingress;
pub mod inspect;
pub mod ip;
mod judge;
mod life;
mod lookup;
mod naming;
pub mod nat;
pub mod reply;
mod report;
pub mod ring;
pub mod stack;
mod station;
pub mod switch;
pub mod synthetic;
mod tally;
pub mod tcp;
mod timer;
pub mod transmit;
mod verdict;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use vnet_proto::model::{FlowId, GuardSet, Protocol, VmId};

use crate::descriptors::{Descriptor, Share};
use crate::engine::aliases::Aliases;
use crate::engine::bindings::Bindings;
use crate::engine::budget::Budgets;
use crate::engine::cache::Cache;
use crate::engine::counters::DhcpCounts;
use crate::engine::discovery::Ipv6Config;
use crate::engine::flow::{Flow, FlowTable};
use crate::engine::fragment::Fragments;
use crate::engine::frame::{Body, DropReason, Frame};
use crate::engine::gateway::dhcp::DhcpOutcome;
use crate::engine::gateway::dns::Dns;
use crate::engine::guest_api::GuestApi;
use crate::engine::held::Held;
use crate::engine::idle::Idle;
use crate::engine::inspect::InspectRefusal;
use crate::engine::nat::Nat;
use crate::engine::ring::RingPool;
use crate::engine::switch::Neighbour;
use crate::engine::switch::flow::Targeted;
use crate::engine::synthetic::table::Synthetics;
use crate::engine::tally::Tally;
use crate::engine::timer::{Timer, Timers};
use crate::engine::transmit::Transmit;
use crate::mac::Mac;
use crate::message::{FlowEnd, Report, Settings};

/// Time since the engine started, on a clock that counts suspended time.
pub type Time = Duration;
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
    /// Addresses that the gateway stands for beside its own; the host alias is one.
    pub nat: Arc<Nat>,
    /// IPv6, unless the network carries none.
    pub ipv6: Option<Ipv6Config>,
    /// Largest IP packet towards the guest, bytes.
    pub mtu_bytes: usize,
    /// The only MAC address that the link may have, if it is pinned.
    pub pinned_mac: Option<Mac>,
    /// Flows at once.
    pub flows_max: usize,
    /// Its part in the host's descriptors.
    pub descriptors: Share,
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
    fn claim(&self, vm: VmId, mac: Mac, address: IpAddr, now: Time) -> bool;
    /// The guest gives an IPv6 address back.
    fn release(&self, vm: VmId, address: Ipv6Addr);
    /// Whether the host has a way out over IPv6: a default route.
    fn has_ipv6(&self) -> bool;
    /// Whether the host has a way to an IPv6 address, by whatever route.
    fn has_way(&self, dialled: IpAddr) -> bool;
    /// Whether `mac` is this guest's from now on: no other guest has it.
    fn learn_mac(&self, vm: VmId, mac: Mac) -> bool;
    /// Answers a DHCP message.
    fn dhcp(&self, vm: VmId, mac: Mac, message: &[u8], now: Time) -> DhcpOutcome;
    /// The guest that owns an address of the subnet.
    fn neighbour(&self, address: IpAddr) -> Option<Neighbour>;
    /// The guards that a destination is under, judged on what would really be dialled.
    fn guards(&self, dialled: SocketAddr, protocol: Protocol) -> GuardSet;
    /// Search domains of the host, where those are advertised rather than the configured ones.
    fn followed_search(&self) -> Option<Vec<vnet_proto::model::Name>> {
        None
    }
    /// The local zones.
    fn zones(&self) -> Arc<crate::engine::gateway::dns::zones::Zones>;
    /// What is counted of the network as a whole, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
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
    /// Hand a packet of a flow between guests to the other one ([`Engine::to_neighbour`]).
    Pass {
        /// The flow's place.
        flow: usize,
        /// The whole packet.
        packet: &'a [u8],
    },
    /// As [`Outcome::Datagram`], [`Outcome::Echo`] or [`Outcome::Pass`], from fragments put together.
    Assembled {
        /// The flow's place.
        flow: usize,
        /// The payload, message or packet.
        payload: Vec<u8>,
    },
    /// As several [`Outcome::Datagram`]: some that waited until the name in them was whole, oldest first.
    Datagrams {
        /// The flow's place.
        flow: usize,
        /// The payloads.
        payloads: Vec<Box<[u8]>>,
    },
    /// Pass the frame to the guest that has this MAC address, or to all; with the address as its
    /// destination. If the one that it is for is not open: [`Engine::handle_unswitched`].
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
    /// Make a way to the front for a guest's connection to the gateway, then say [`Engine::handle_dialled`], or
    /// [`Engine::handle_refused`] where there is none.
    OpenGuestApi {
        /// The flow's place.
        flow: usize,
        /// The address that the guest connects from.
        guest: IpAddr,
    },
    /// Send these on a UDP or echo flow's host socket, opening it if it is not.
    Send {
        /// The flow's place.
        flow: usize,
        /// Payloads or messages, oldest first.
        packets: Vec<Box<[u8]>>,
    },
    /// Hand these packets of a flow to the other guest ([`Engine::to_neighbour`]).
    Pass {
        /// The flow's place.
        flow: usize,
        /// Whole packets, oldest first.
        packets: Vec<Box<[u8]>>,
    },
    /// Tell another guest's engine that a flow between the two is over
    /// ([`Engine::handle_permit_closed`]).
    PermitClosed {
        /// The other guest.
        to: VmId,
        /// The flow.
        flow: FlowId,
        /// How it ended.
        end: FlowEnd,
    },
    /// Close a flow's host socket; its place may be taken again right after.
    Close {
        /// The flow's place.
        flow: usize,
        /// With RST.
        reset: bool,
        /// To be given back once it is closed.
        descriptor: Option<Descriptor>,
    },
    /// Ask an upstream resolver, then say [`Engine::handle_resolved`].
    Resolve {
        /// Number of the query.
        query: u64,
        /// The message.
        bytes: Vec<u8>,
        /// Of the socket that it is asked through.
        descriptor: Descriptor,
    },
    /// Tell another guest's engine, or this one, to give up flows ([`Engine::make_way`]).
    MakeWay {
        /// Which guest.
        vm: VmId,
        /// How many.
        count: usize,
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
    idle: Idle,
    targeted: Targeted,
    next_ingress_port: u16,
    dirty: Vec<usize>,
    touched: Vec<usize>,
    cache: Cache,
    held: Held,
    tally: Tally,
    bindings: Bindings,
    synthetics: Synthetics,
    budgets: Budgets,
    dhcp: DhcpCounts,
    guest_api: GuestApi,
    dns: Dns,
    aliases: Aliases,
    /// What was counted when it was last reported.
    counted: BTreeMap<String, u64>,
    /// When the timers of the two above are set to fire.
    dns_set: Option<Time>,
    bindings_set: Option<Time>,
    fragments: Fragments,
    rings: RingPool,
    random: StdRng,
    mac: Option<Mac>,
    addresses: Vec<Ipv4Addr>,
    addresses_ipv6: Vec<station::Address6>,
    /// Whether the gateway advertises itself.
    advertising: bool,
    claimed_hostname: String,
    /// The address that DHCP gave.
    leased: Option<Ipv4Addr>,
    status_changed: bool,
    /// The latest time that anybody told it.
    clock: Time,
    report_set: bool,
    drops: [u64; DropReason::ALL.len()],
    /// Connections that were given up before the guest had opened them.
    unopened: u64,
    /// Flows and queries that were refused because the host's descriptors are few.
    descriptors_refused: u64,
    /// Flows that ended for the same reason, to make way for other guests'.
    made_way: u64,
    /// Frames that captures of this guest lost, counted by the driver.
    pub capture_dropped: u64,
    /// Dials that the host itself refused.
    dials_failed: u64,
    /// Clients of forwards that could not be shown to the guest, which has a flow of theirs already.
    ingress_refused: u64,
    /// Flows refused for their name, by [`InspectRefusal::WORDS`].
    name_refusals: [u64; InspectRefusal::WORDS.len()],
}

impl Engine {
    /// A guest that has said nothing yet.
    pub fn new(config: EngineConfig, surroundings: Arc<dyn Surroundings>, name: String) -> Self {
        let settings = Settings::unsaid(name, config.lookup_hold, config.hold);
        Self {
            transmit: Transmit::new(config.gateway_mac),
            events: VecDeque::new(),
            timers: Timers::default(),
            flows: FlowTable::new(config.flows_max),
            next_flow: 1,
            idle: Idle::default(),
            targeted: Targeted::default(),
            next_ingress_port: 0,
            dirty: Vec::new(),
            touched: Vec::new(),
            cache: Cache::default(),
            held: Held::new(config.vm, config.hold),
            tally: Tally::default(),
            bindings: Bindings::default(),
            synthetics: Synthetics::default(),
            budgets: Budgets::default(),
            dhcp: DhcpCounts::default(),
            guest_api: GuestApi::default(),
            dns: Dns::new(config.lookup_hold, config.seed),
            aliases: Aliases::default(),
            counted: BTreeMap::new(),
            dns_set: None,
            bindings_set: None,
            fragments: Fragments::default(),
            rings: RingPool::default(),
            random: StdRng::from_seed(config.seed),
            mac: config.pinned_mac,
            addresses: Vec::new(),
            addresses_ipv6: Vec::new(),
            advertising: false,
            claimed_hostname: String::new(),
            leased: None,
            status_changed: false,
            clock: Time::ZERO,
            report_set: false,
            drops: [0; DropReason::ALL.len()],
            unopened: 0,
            descriptors_refused: 0,
            made_way: 0,
            capture_dropped: 0,
            dials_failed: 0,
            ingress_refused: 0,
            name_refusals: [0; InspectRefusal::WORDS.len()],
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
        self.begin_advertising(now);
        match &frame.body {
            Body::Arp(arp) => self.handle_arp(now, &frame, arp),
            Body::Ipv6(ip) => self.handle_ipv6(now, &frame, ip),
            Body::Ipv4(ip) => {
                if self.is_dhcp(ip) {
                    self.handle_dhcp(now, frame.source, ip);
                    return Ok(Outcome::Done);
                }
                let IpAddr::V4(source) = ip.source else {
                    return Err(DropReason::Malformed);
                };
                self.check_source(now, frame.source, source)?;
                if frame.destination != self.config.gateway_mac {
                    return self.switch(now, &frame);
                }
                if let Some(mac) = self.routed(ip) {
                    return Ok(Outcome::Switch(mac));
                }
                self.handle_ip(now, ip)
            }
        }
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
                Timer::Budgets => self.handle_budgets_timeout(now),
                Timer::Advertise => self.handle_advertise_timeout(now),
            }
        }
    }

    /// The guest's MAC address, once it has spoken.
    pub fn spoken_mac(&self) -> Option<Mac> {
        self.mac.filter(|mac| *mac == self.transmit.guest)
    }

    /// Whether other guests' frames may come in.
    pub fn switch_open(&self) -> bool {
        self.settings.switch_open
    }

    /// Ends everything: the link is gone for good. What was counted since the last report is told.
    pub fn handle_link_down(&mut self) {
        self.handle_report_timeout();
        for at in self.flows.places() {
            self.end_flow(at, FlowEnd::VmDown);
        }
        self.tell_last_uses();
    }
}
