//! IPv6 as the guest meets it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, TcpPacket, UdpPacket};
use vnet_proto::model::{FlowMatch, Match, Miss, Protocol, Subject, VerdictAction, parse_prefix};

use super::kit::*;
use super::town::{self, ANN, BOB, Town, address6};
use crate::engine::discovery::ADVERTISE_INTERVAL;
use crate::engine::frame::DropReason;
use crate::engine::gateway::ndp;
use crate::engine::ip::Ip;
use crate::engine::station::{ADDRESS_IDLE, ADDRESSES_MAX};
use crate::engine::{Event, Outcome};
use crate::mac::Mac;
use crate::message::{Order, Report, Settings};

pub(super) const GUEST6: &str = "fd00::2";
const GATEWAY6: &str = "fd00::1";
const LINK_LOCAL: &str = "fe80::aa:2";
const ROUTER: &str = "fe80::1";
const SERVER6: &str = "2001:db8::9";

pub(super) fn ip6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// An IPv6 packet.
pub(super) fn packet(source: &str, destination: &str, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[next, hops]);
    packet.extend_from_slice(&ip6(source).octets());
    packet.extend_from_slice(&ip6(destination).octets());
    packet.extend_from_slice(payload);
    packet
}

/// A message of neighbour discovery about an address.
pub(super) fn neighbour(kind: u8, flags: u8, target: &str, option: Option<(u8, Mac)>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend_from_slice(&ip6(target).octets());
    if let Some((kind, mac)) = option {
        message.extend_from_slice(&[kind, 1]);
        message.extend_from_slice(&mac.0);
    }
    message
}

pub(super) fn probe(target: &str) -> Vec<u8> {
    let group = ndp::solicited_node(ip6(target)).to_string();
    packet("::", &group, 58, 255, &neighbour(135, 0, target, None))
}

fn udp6(source: &str, destination: &str, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut udp = 50_000u16.to_be_bytes().to_vec();
    udp.extend_from_slice(&port.to_be_bytes());
    udp.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(payload);
    packet(source, destination, 17, 64, &udp)
}

fn tcp6(
    destination: &str,
    port: u16,
    flags: u8,
    sequence: u32,
    acknowledgement: u32,
    payload: &[u8],
) -> Vec<u8> {
    let whole = segment((SERVER, port), flags, sequence, acknowledgement, payload);
    packet(GUEST6, destination, 6, 64, &whole[20..])
}

fn echo6(destination: &str, payload: &[u8]) -> Vec<u8> {
    let message = [&[128, 0, 0, 0, 0, 77, 0, 1], payload].concat();
    packet(GUEST6, destination, 58, 64, &message)
}

impl Rig {
    fn ip6(&mut self, packet: &[u8]) {
        self.frame(0x86dd, packet);
    }

    /// Takes the IPv6 packets sent, without router advertisements to everybody.
    fn sent6(&mut self) -> Vec<Vec<u8>> {
        self.frames()
            .into_iter()
            .filter(|f| f[12..14] == [0x86, 0xdd])
            .map(|f| f[14..].to_vec())
            .filter(|p| !(p[6] == 58 && p[40] == 134 && p[24] == 0xff))
            .collect()
    }

    /// Takes the only ICMPv6 message sent: from whom, its type and code, and the rest of it.
    fn only_icmp6(&mut self) -> (String, [u8; 2], Vec<u8>) {
        let sent = self.sent6();
        assert_eq!(sent.len(), 1, "{} packets were sent", sent.len());
        let ip = Ip::parse(&sent[0]).unwrap();
        let (IpAddr::V6(from), IpAddr::V6(to)) = (ip.source, ip.destination) else {
            panic!("not IPv6")
        };
        let message = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        Icmpv6Repr::parse(&from, &to, &message, &ChecksumCapabilities::default()).unwrap();
        let bytes = ip.payload();
        (from.to_string(), [bytes[0], bytes[1]], bytes[4..].to_vec())
    }

    fn settings(&mut self, switch_open: bool) {
        self.order(Order::Settings(Settings {
            switch_open,
            ..settings()
        }));
    }

    fn only_miss(&mut self) -> Miss {
        let misses = self.misses();
        assert_eq!(misses.len(), 1, "{misses:?}");
        misses.into_iter().next().unwrap()
    }
}

fn flow(miss: &Miss) -> &vnet_proto::model::FlowSubject {
    match &miss.subject {
        Subject::Flow(flow) => flow,
        Subject::Lookup(_) => panic!("not a flow"),
    }
}

fn payloads(rig: &mut Rig) -> Vec<Vec<u8>> {
    std::mem::take(&mut rig.events)
        .into_iter()
        .filter_map(|e| match e {
            Event::Send { packets, .. } => Some(packets.into_iter().map(Vec::from)),
            _ => None,
        })
        .flatten()
        .collect()
}

// What the gateway says of itself.

#[test]
fn a_router_solicitation_is_answered_to_who_asked() {
    let mut rig = Rig::dual();
    let solicitation = [&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1][..], &GUEST_MAC.0].concat();
    rig.ip6(&packet(LINK_LOCAL, "ff02::2", 58, 255, &solicitation));
    let sent = rig.sent6();
    assert_eq!(sent.len(), 1);
    let ip = Ip::parse(&sent[0]).unwrap();
    assert_eq!(
        (ip.source.to_string(), ip.destination.to_string()),
        (ROUTER.into(), LINK_LOCAL.into())
    );
    assert_eq!(ip.hop_limit, 255);
    let message = ip.payload();
    assert_eq!((message[0], &message[6..8]), (134, &1800u16.to_be_bytes()[..]));
}

#[test]
fn the_gateway_advertises_itself_when_the_guest_shows_itself_and_from_then_on() {
    let mut rig = Rig::dual();
    let advertised = |rig: &mut Rig| {
        let frames = rig.frames();
        let is_one = |f: &&Vec<u8>| f[..6] == [0x33, 0x33, 0, 0, 0, 1] && f[54] == 134;
        frames.iter().filter(is_one).count()
    };
    rig.ip6(&probe(LINK_LOCAL));
    assert_eq!(advertised(&mut rig), 1);
    rig.ip6(&probe(LINK_LOCAL));
    assert_eq!(advertised(&mut rig), 0, "once");
    rig.wait(ADVERTISE_INTERVAL);
    assert_eq!(advertised(&mut rig), 1);
    rig.wait(ADVERTISE_INTERVAL * 2);
    assert_eq!(advertised(&mut rig), 2);
}

#[test]
fn it_is_a_default_router_only_while_the_host_has_a_way_out() {
    let mut rig = Rig::dual();
    let lifetime = |rig: &mut Rig| {
        let frames = rig.frames();
        let last = frames
            .iter()
            .rfind(|f| f[12..14] == [0x86, 0xdd] && f[54] == 134)
            .unwrap();
        u16::from_be_bytes([last[60], last[61]])
    };
    rig.surroundings.no_ipv6.store(true, Ordering::Relaxed);
    rig.ip6(&probe(LINK_LOCAL));
    assert_eq!(lifetime(&mut rig), 0);
    rig.surroundings.no_ipv6.store(false, Ordering::Relaxed);
    rig.order(Order::WayChanged);
    assert_eq!(lifetime(&mut rig), 1800, "said at once");
}

#[test]
fn the_gateway_tells_its_own_addresses_only() {
    let mut rig = Rig::dual();
    let option = Some((1, GUEST_MAC));
    for target in [GATEWAY6, ROUTER] {
        rig.ip6(&packet(
            GUEST6,
            "ff02::1:ff00:1",
            58,
            255,
            &neighbour(135, 0, target, option),
        ));
        let (from, kind, rest) = rig.only_icmp6();
        assert_eq!((from.as_str(), kind), (target, [136, 0]));
        assert_eq!(rest[0], 0xe0, "router, solicited, override");
        assert_eq!(rest[4..20], ip6(target).octets());
        assert_eq!(rest[22..], GATEWAY_MAC.0);
    }
    rig.ip6(&packet(
        GUEST6,
        "ff02::1:ff00:77",
        58,
        255,
        &neighbour(135, 0, "fd00::77", option),
    ));
    assert!(rig.sent6().is_empty());
    assert_eq!(rig.engine.dropped(DropReason::GuestToGuest), 1);
}

// Who a guest may be.

#[test]
fn a_probe_for_a_free_address_is_not_answered_and_the_address_is_the_guests() {
    let mut rig = Rig::dual();
    rig.ip6(&probe(LINK_LOCAL));
    rig.ip6(&probe(GUEST6));
    assert!(rig.sent6().is_empty());
    rig.wait(Duration::from_secs(2));
    let addresses = rig.reports().into_iter().rev().find_map(|r| match r {
        Report::VmStatus(status) => Some(status.addresses),
        _ => None,
    });
    assert_eq!(
        addresses.unwrap(),
        [IpAddr::V6(ip6(LINK_LOCAL)), IpAddr::V6(ip6(GUEST6))]
    );
}

#[test]
fn a_probe_for_what_is_somebodys_is_answered_to_everybody() {
    let mut rig = Rig::dual();
    let taken = ["fd00::9", "fe80::9"];
    *rig.surroundings.neighbour_ipv6.lock().unwrap() = taken.map(ip6).to_vec();
    for target in ["fd00::9", "fe80::9", GATEWAY6, ROUTER] {
        rig.ip6(&probe(target));
        let sent = rig.sent6();
        assert_eq!(sent.len(), 1, "{target}");
        let ip = Ip::parse(&sent[0]).unwrap();
        assert_eq!(ip.destination.to_string(), "ff02::1");
        let message = ip.payload();
        assert_eq!(
            (message[0], message[4] & 0x60),
            (136, 0x20),
            "unsolicited, override"
        );
        assert_eq!(message[8..24], ip6(target).octets());
    }
    rig.ip6(&probe("2001:db8::5"));
    assert!(rig.sent6().is_empty(), "nobody's on this link");
    assert_eq!(rig.engine.dropped(DropReason::SpoofedAddress), 1);
}

#[test]
fn packets_from_others_addresses_are_dropped() {
    let mut rig = Rig::dual();
    *rig.surroundings.neighbour_ipv6.lock().unwrap() = vec![ip6("fd00::9"), ip6("fe80::9")];
    let foreign = [
        "fd00::9",
        "fe80::9",
        GATEWAY6,
        ROUTER,
        SERVER6,
        "::",
        "::1",
        "fd00::",
        "fd00:0:0:1::2",
        "fe80:0:0:1::2",
        "ff02::1",
        "::ffff:192.168.127.2",
    ];
    for source in foreign {
        rig.ip6(&udp6(source, SERVER6, 123, b"x"));
    }
    assert_eq!(
        rig.engine.dropped(DropReason::SpoofedAddress),
        foreign.len() as u64
    );
    assert!(rig.misses().is_empty());
    rig.ip6(&udp6(GUEST6, SERVER6, 123, b"x"));
    assert_eq!(rig.misses().len(), 1, "an address of its own");
}

#[test]
fn one_link_binds_few_addresses_of_both_families_and_what_is_idle_makes_way() {
    let mut rig = Rig::dual();
    rig.ip(&udp((SERVER, 9), b"x"));
    let more = ADDRESSES_MAX as u16 + 1;
    for host in 2..=more {
        rig.ip6(&probe(&format!("fd00::{host:x}")));
    }
    assert_eq!(rig.engine.dropped(DropReason::AddressLimit), 1);
    let (_, kind, rest) = rig.only_icmp6();
    assert_eq!(kind, [136, 0], "the guest must not believe that it has it");
    assert_eq!(rest[4..20], ip6(&format!("fd00::{more:x}")).octets());

    rig.wait(ADDRESS_IDLE - Duration::from_secs(1));
    rig.ip6(&udp6(GUEST6, SERVER6, 123, b"x"));
    rig.wait(Duration::from_secs(1));
    rig.frames();
    rig.ip6(&probe("fd00::99"));
    assert!(rig.sent6().is_empty(), "there is room now");
    let released = rig.surroundings.released.lock().unwrap().clone();
    assert_eq!(released.len(), 1);
    assert_ne!(released[0], ip6(GUEST6), "it was used a moment ago");
}

#[test]
fn what_only_a_router_says_is_dropped_and_so_are_others_neighbours() {
    let mut rig = Rig::dual();
    rig.settings(true);
    *rig.surroundings.neighbour_ipv6.lock().unwrap() = vec![ip6("fd00::9")];
    let advertisement = ndp::Router {
        mac: GUEST_MAC,
        prefix: "2001:db8:bad::/64".parse().unwrap(),
        resolver: ip6(GUEST6),
        search: &[],
        mtu_bytes: 1500,
        is_default: true,
    }
    .advertisement();
    rig.ip6(&packet(LINK_LOCAL, "ff02::1", 58, 255, &advertisement));
    rig.ip6(&packet(
        LINK_LOCAL,
        "ff02::1",
        58,
        255,
        &neighbour(137, 0, SERVER6, None),
    ));
    assert_eq!(rig.engine.dropped(DropReason::RogueNdp), 2);
    for target in ["fd00::9", GATEWAY6, ROUTER, SERVER6] {
        let message = neighbour(136, 0x20, target, Some((2, GUEST_MAC)));
        rig.ip6(&packet(LINK_LOCAL, "ff02::1", 58, 255, &message));
    }
    assert_eq!(rig.engine.dropped(DropReason::RogueNdp), 6);
    let other = Mac([2, 0, 0, 0, 0, 3]);
    rig.ip6(&packet(
        LINK_LOCAL,
        "ff02::1",
        58,
        255,
        &neighbour(136, 0x20, LINK_LOCAL, Some((2, other))),
    ));
    assert_eq!(rig.engine.dropped(DropReason::SpoofedMac), 1);
    assert!(rig.sent6().is_empty());
}

#[test]
fn discovery_from_beyond_a_router_or_in_fragments_is_not_listened_to() {
    let mut rig = Rig::dual();
    let message = neighbour(135, 0, GATEWAY6, Some((1, GUEST_MAC)));
    rig.ip6(&packet(GUEST6, "ff02::1:ff00:1", 58, 254, &message));
    let atomic = [&[58, 0, 0, 0, 0, 0, 0, 1][..], &message].concat();
    rig.ip6(&packet(GUEST6, "ff02::1:ff00:1", 44, 255, &atomic));
    assert_eq!(rig.engine.dropped(DropReason::Malformed), 2);
    for (offset, part) in [(1u16, &message[..16]), (16, &message[16..])] {
        let [high, low] = offset.to_be_bytes();
        let part = [&[58, 0, high, low, 0, 0, 0, 2][..], part].concat();
        rig.ip6(&packet(GUEST6, GATEWAY6, 44, 255, &part));
    }
    assert_eq!(rig.engine.dropped(DropReason::IpProtocol), 1);
    assert!(rig.sent6().is_empty());
}

#[test]
fn listener_reports_are_taken_in_silence() {
    let mut rig = Rig::dual();
    let report = [&[58, 0, 5, 2, 0, 0, 1, 0][..], &[143, 0, 0, 0, 0, 0, 0, 0]].concat();
    rig.ip6(&packet("::", "ff02::16", 0, 1, &report));
    assert!(rig.sent6().is_empty());
    let dropped: u64 = DropReason::ALL.into_iter().map(|r| rig.engine.dropped(r)).sum();
    assert_eq!(dropped, 0);
}

#[test]
fn on_an_open_switch_ipv6_passes_but_for_what_servers_and_routers_say() {
    let mut rig = Rig::dual();
    let other = Mac([2, 0, 0, 0, 0, 3]);
    let frame = |packet: &[u8]| [&other.0[..], &GUEST_MAC.0, &[0x86, 0xdd], packet].concat();
    let packet_to_other = frame(&udp6(GUEST6, "fd00::9", 9, b"x"));
    assert!(matches!(
        rig.engine.handle_frame(rig.now, &packet_to_other),
        Outcome::Done
    ));
    assert_eq!(rig.engine.dropped(DropReason::UnknownStation), 1);
    rig.settings(true);
    assert!(matches!(rig.engine.handle_frame(rig.now, &packet_to_other), Outcome::Switch(to) if to == other));
    let mut answer = udp6(GUEST6, "fd00::9", 546, b"x");
    answer[40..42].copy_from_slice(&547u16.to_be_bytes());
    assert!(matches!(
        rig.engine.handle_frame(rig.now, &frame(&answer)),
        Outcome::Done
    ));
    assert_eq!(rig.engine.dropped(DropReason::RogueDhcp), 1);
}

// Flows.

#[test]
fn a_connection_is_asked_for_dialled_and_carried() {
    let mut rig = Rig::dual();
    rig.ip6(&tcp6(SERVER6, 80, 2, 1000, 0, &[]));
    let miss = rig.only_miss();
    let subject = flow(&miss);
    assert_eq!(subject.key.to_string(), "tcp [2001:db8::9]:80");
    assert!(rig.sent6().is_empty(), "unanswered until it is decided");
    rig.answer(&miss, VerdictAction::Allow);
    let (at, to) = rig.only_dial();
    assert_eq!(to, "[2001:db8::9]:80".parse::<SocketAddr>().unwrap());
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (flags, sequence, acknowledgement, _) = only_segment6(&mut rig);
    assert_eq!((flags, acknowledgement), (0x12, 1001));

    rig.ip6(&tcp6(SERVER6, 80, 0x18, 1001, sequence + 1, b"hello"));
    let mut got = Vec::new();
    rig.engine
        .connection(at)
        .unwrap()
        .lend_received(|bytes| {
            got.extend_from_slice(bytes);
            Ok::<_, ()>(bytes.len())
        })
        .unwrap();
    assert_eq!(got, b"hello");
    rig.engine
        .connection(at)
        .unwrap()
        .lend_room(|room| {
            room[..5].copy_from_slice(b"world");
            Ok::<_, ()>(5)
        })
        .unwrap();
    rig.service();
    let (_, _, acknowledgement, payload) = only_segment6(&mut rig);
    assert_eq!((acknowledgement, payload.as_slice()), (1006, b"world".as_slice()));
}

#[test]
fn a_segment_behind_extension_headers_is_one_like_any_other() {
    let mut rig = Rig::dual();
    let plain = tcp6(SERVER6, 80, 2, 1000, 0, &[]);
    let options = [6u8, 0, 1, 4, 0, 0, 0, 0];
    let behind = packet(GUEST6, SERVER6, 60, 64, &[&options, &plain[40..]].concat());
    rig.ip6(&behind);
    let miss = rig.only_miss();
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    assert_eq!(only_segment6(&mut rig).0, 0x12);
}

#[test]
fn a_refusal_looks_as_on_a_network() {
    let mut rig = Rig::dual();
    rig.ip6(&tcp6(SERVER6, 80, 2, 1000, 0, &[]));
    let miss = rig.only_miss();
    rig.answer(&miss, VerdictAction::Deny);
    let (flags, _, acknowledgement, _) = only_segment6(&mut rig);
    assert_eq!((flags, acknowledgement), (0x14, 1001), "RST");

    rig.ip6(&udp6(GUEST6, SERVER6, 123, b"x"));
    let miss = rig.only_miss();
    rig.answer(&miss, VerdictAction::Deny);
    let (from, kind, rest) = rig.only_icmp6();
    assert_eq!(
        (from.as_str(), kind),
        (GATEWAY6, [1, 1]),
        "administratively prohibited"
    );
    assert_eq!(rest[4..], udp6(GUEST6, SERVER6, 123, b"x")[..48]);
    rig.ip6(&udp6(GUEST6, SERVER6, 123, b"x"));
    assert_eq!(rig.only_icmp6().1, [1, 1], "from the cache");

    rig.ip6(&udp6(GUEST6, "fd00::77", 123, b"x"));
    assert_eq!(rig.only_icmp6().1, [1, 3], "nobody has that address");
    rig.ip6(&udp6(GUEST6, GATEWAY6, 123, b"x"));
    assert_eq!(rig.only_icmp6().1, [1, 4], "the gateway's port");
    rig.ip6(&tcp6(GATEWAY6, 22, 2, 1000, 0, &[]));
    assert_eq!(only_segment6(&mut rig).0, 0x14);
}

#[test]
fn a_host_without_a_way_says_so_at_once_and_nobody_is_asked() {
    let mut rig = Rig::dual();
    rig.surroundings.no_ipv6.store(true, Ordering::Relaxed);
    for packet in [
        tcp6(SERVER6, 80, 2, 1000, 0, &[]),
        udp6(GUEST6, SERVER6, 123, b"x"),
        echo6(SERVER6, b"ping"),
    ] {
        rig.ip6(&packet);
        let (from, kind, _) = rig.only_icmp6();
        assert_eq!((from.as_str(), kind), (GATEWAY6, [1, 0]), "no route");
    }
    assert_eq!(rig.engine.dropped(DropReason::HostRefused), 3);
    assert!(rig.misses().is_empty());
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn datagrams_and_fragments_of_them_are_carried_both_ways() {
    let mut rig = Rig::dual();
    let whole = udp6(GUEST6, SERVER6, 123, &[7; 2000]);
    let datagram = &whole[40..];
    let part = |offset: usize, more: bool, bytes: &[u8]| {
        let [high, low] = (offset as u16 | u16::from(more)).to_be_bytes();
        packet(
            GUEST6,
            SERVER6,
            44,
            64,
            &[&[17, 0, high, low, 0, 0, 0, 9][..], bytes].concat(),
        )
    };
    rig.ip6(&part(1448, false, &datagram[1448..]));
    assert!(rig.misses().is_empty(), "a later fragment alone opens nothing");
    rig.ip6(&part(0, true, &datagram[..1448]));
    let miss = rig.only_miss();
    rig.answer(&miss, VerdictAction::Allow);
    let Some(Event::Send { flow, packets }) = rig.events.pop() else {
        panic!()
    };
    assert_eq!(packets, [vec![7; 2000].into_boxed_slice()]);

    rig.engine.handle_datagram(rig.now, flow, b"answer");
    let sent = rig.sent6();
    let ip = Ip::parse(&sent[0]).unwrap();
    assert_eq!(
        (ip.source.to_string(), ip.destination.to_string()),
        (SERVER6.into(), GUEST6.into())
    );
    let answer = UdpPacket::new_checked(ip.payload()).unwrap();
    assert!(answer.verify_checksum(&ip.source.into(), &ip.destination.into()));
    assert_eq!((answer.src_port(), answer.payload()), (123, b"answer".as_slice()));

    rig.ip6(&part(0, true, &datagram[..16]));
    rig.ip6(&part(8, true, &datagram[..16]));
    assert_eq!(rig.engine.dropped(DropReason::Fragment), 1, "an overlap");
    let tiny = tcp6(SERVER6, 80, 2, 1000, 0, &[]);
    rig.ip6(&packet(
        GUEST6,
        SERVER6,
        44,
        64,
        &[&[6, 0, 0, 1, 0, 0, 0, 8][..], &tiny[40..48]].concat(),
    ));
    assert_eq!(rig.engine.dropped(DropReason::Fragment), 2, "TCP in fragments");
}

#[test]
fn echo_to_the_gateway_is_answered_and_beyond_it_asks() {
    let mut rig = Rig::dual();
    rig.ip6(&echo6(GATEWAY6, b"ping"));
    let (from, kind, rest) = rig.only_icmp6();
    assert_eq!((from.as_str(), kind), (GATEWAY6, [129, 0]));
    assert_eq!(rest, [&[0, 77, 0, 1], &b"ping"[..]].concat());

    rig.ip6(&echo6(SERVER6, b"ping"));
    let miss = rig.only_miss();
    assert_eq!(flow(&miss).key.to_string(), "icmpv6 2001:db8::9");
    rig.answer(&miss, VerdictAction::Allow);
    let Some(Event::Send { flow, packets }) = rig.events.pop() else {
        panic!()
    };
    assert_eq!(packets[0][..2], [128, 0]);
    let mut reply = packets[0].to_vec();
    reply[0] = 129;
    reply[4..6].copy_from_slice(&[0xab, 0xcd]);
    rig.engine.handle_echo_reply(rig.now, flow, &mut reply);
    let (from, kind, rest) = rig.only_icmp6();
    assert_eq!((from.as_str(), kind), (SERVER6, [129, 0]));
    assert_eq!(rest[..2], [0, 77], "the guest's own identifier");
}

#[test]
fn odd_protocols_and_icmp_of_the_other_family_are_dropped() {
    let mut rig = Rig::dual();
    for (next, payload) in [
        (132u8, &[0u8; 12][..]),
        (47, &[0; 12]),
        (50, &[0; 12]),
        (59, &[]),
        (1, &[8, 0, 0, 0, 0, 1, 0, 1]),
    ] {
        rig.ip6(&packet(GUEST6, SERVER6, next, 64, payload));
    }
    rig.ip(&ipv4(GUEST, SERVER, 58, &[128, 0, 0, 0, 0, 1, 0, 1]));
    rig.ip6(&packet(GUEST6, SERVER6, 58, 64, &[2, 0, 0, 0, 0, 0, 5, 0]));
    assert_eq!(rig.engine.dropped(DropReason::IpProtocol), 7);
    assert!(rig.misses().is_empty() && rig.sent6().is_empty());
}

#[test]
fn the_gateways_dns_answers_from_the_address_that_was_asked() {
    let mut rig = Rig::dual();
    // A query for the root: refused at once, without a verdict.
    let query = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 28, 0, 1];
    for (source, server) in [(GUEST6, GATEWAY6), (LINK_LOCAL, ROUTER), (LINK_LOCAL, GATEWAY6)] {
        rig.ip6(&udp6(source, server, 53, &query));
        let sent = rig.sent6();
        let ip = Ip::parse(&sent[0]).unwrap();
        assert_eq!(
            (ip.source.to_string(), ip.destination.to_string()),
            (server.into(), source.into())
        );
        let answer = UdpPacket::new_checked(ip.payload()).unwrap();
        assert!(answer.verify_checksum(&ip.source.into(), &ip.destination.into()));
        assert_eq!((answer.src_port(), &answer.payload()[..2]), (53, &[0, 7][..]));
    }
    rig.ip6(&tcp6(GATEWAY6, 53, 2, 1000, 0, &[]));
    rig.service();
    assert_eq!(only_segment6(&mut rig).0, 0x12, "over TCP as well");
}

// IPv6 is no way round a rule for IPv4.

#[test]
fn spellings_of_ipv4_addresses_are_refused_or_judged_as_those() {
    let mut rig = Rig::dual();
    let refused = [
        "::ffff:10.0.0.1",
        "::10.0.0.1",
        "2002:a00:1::1",
        "2001:0:a00:1::1",
        "64:ff9b:1::a00:1",
        "fec0::1",
        "::1",
        "::",
        "ff02::1",
        "ff0e::1",
        "fe80::77",
    ];
    for destination in refused {
        rig.ip6(&tcp6(destination, 80, 2, 1000, 0, &[]));
        rig.ip6(&udp6(GUEST6, destination, 80, b"x"));
        rig.ip6(&echo6(destination, b"x"));
    }
    assert_eq!(
        rig.engine.dropped(DropReason::Destination),
        3 * refused.len() as u64
    );
    assert!(rig.misses().is_empty());

    // A verdict on 10.0.0.0/8 holds for its NAT64 spelling, one on ::/0 does not.
    let nat64 = "64:ff9b::a00:1";
    for (prefix, covered) in [("10.0.0.0/8", true), ("::/0", false)] {
        let mut rig = Rig::dual();
        let asked = if covered { "10.9.9.9" } else { SERVER6 };
        match asked.parse().unwrap() {
            IpAddr::V4(v4) => rig.syn((v4, 80)),
            IpAddr::V6(_) => rig.ip6(&tcp6(asked, 80, 2, 1000, 0, &[])),
        }
        let miss = rig.only_miss();
        let mut verdict = verdict(&miss, VerdictAction::Deny);
        verdict.found = Match::Flow(FlowMatch {
            prefix: parse_prefix(prefix).unwrap(),
            ..FlowMatch::exact(&flow(&miss).key)
        });
        rig.order(Order::Verdict(Box::new(verdict)));
        rig.frames();
        rig.ip6(&tcp6(nat64, 80, 2, 2000, 0, &[]));
        assert_eq!(rig.misses().is_empty(), covered, "{prefix}");
        assert_eq!(!rig.sent6().is_empty(), covered, "{prefix}");
    }
}

#[test]
fn an_allowed_nat64_destination_is_dialled_as_the_guest_wrote_it() {
    let mut rig = Rig::dual();
    rig.ip6(&tcp6("64:ff9b::a00:1", 80, 2, 1000, 0, &[]));
    let miss = rig.only_miss();
    assert_eq!(FlowMatch::exact(&flow(&miss).key).to_string(), "tcp 10.0.0.1:80");
    rig.answer(&miss, VerdictAction::Allow);
    let (_, to) = rig.only_dial();
    assert_eq!(to.to_string(), "[64:ff9b::a00:1]:80");
    assert_eq!(Protocol::Tcp, flow(&miss).key.protocol);
}

#[test]
fn no_frame_makes_the_engine_panic() {
    let mut rig = Rig::dual();
    let seeds = [
        tcp6(SERVER6, 80, 0x18, 1001, 1, b"hello"),
        udp6(GUEST6, GATEWAY6, 53, &[0; 30]),
        echo6(GATEWAY6, b"x"),
        probe(GUEST6),
        packet(
            GUEST6,
            "ff02::1:ff00:1",
            58,
            255,
            &neighbour(135, 0, GATEWAY6, Some((1, GUEST_MAC))),
        ),
        packet(
            GUEST6,
            SERVER6,
            44,
            64,
            &[&[17, 0, 0, 1, 0, 0, 0, 1][..], &[0; 16]].concat(),
        ),
        packet(
            GUEST6,
            SERVER6,
            0,
            64,
            &[&[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0][..], &[0; 16]].concat(),
        ),
    ];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for turn in 0..60_000u32 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let mut packet = seeds[(state % seeds.len() as u64) as usize].clone();
        for _ in 0..(state >> 8) % 4 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (state >> 20) as usize % packet.len();
            packet[at] = (state >> 40) as u8;
        }
        packet.truncate(packet.len().saturating_sub((state >> 50) as usize % 8));
        rig.ip6(&packet);
        if turn % 64 == 0 {
            rig.wait(Duration::from_millis(200));
            rig.events.clear();
            rig.frames();
        }
    }
    assert!(rig.engine.flow_count() <= 64);
}

#[test]
fn a_forward_leads_to_an_ipv6_address_from_the_gateways() {
    let mut rig = Rig::dual();
    let target = "[fd00::2]:22".parse().unwrap();
    rig.engine.open_ingress(rig.now, None, target, None).unwrap();
    rig.service();
    let sent = rig.sent6();
    let ip = Ip::parse(&sent[0]).unwrap();
    assert_eq!(
        (ip.source.to_string(), ip.destination.to_string()),
        (GATEWAY6.into(), GUEST6.into())
    );
    assert_eq!(ip.payload()[13], 2, "SYN");
    for elsewhere in ["[fd00::1]:22", "[2001:db8::9]:22"] {
        assert!(
            rig.engine
                .open_ingress(rig.now, None, elsewhere.parse().unwrap(), None)
                .is_none()
        );
    }
    assert_eq!(payloads(&mut rig), Vec::<Vec<u8>>::new());
}

#[test]
fn a_forwards_client_is_seen_by_its_own_ipv6_address_where_it_has_one() {
    let mut rig = Rig::dual();
    let target = "[fd00::2]:22".parse().unwrap();
    for (client, seen) in [
        ("[2001:db8::9]:4000", "2001:db8::9"),
        ("[fd12:3456::9]:4000", "fd12:3456::9"),
        // Of the network, link-local, of another family, or standing for an IPv4 address.
        ("[fd00::9]:4000", GATEWAY6),
        ("[fe80::9]:4000", GATEWAY6),
        ("[::1]:4000", GATEWAY6),
        ("203.0.113.9:4000", GATEWAY6),
        ("[::ffff:203.0.113.9]:4000", GATEWAY6),
    ] {
        let client = client.parse().unwrap();
        let at = rig
            .engine
            .open_ingress(rig.now, None, target, Some(client))
            .unwrap();
        rig.service();
        let sent = rig.sent6();
        assert_eq!(Ip::parse(&sent[0]).unwrap().source.to_string(), seen, "{client}");
        rig.engine.handle_host_reset(rig.now, at);
        rig.service();
        rig.sent6();
    }
}

/// Takes the only TCP segment sent: flags, sequence, acknowledgement, payload.
fn only_segment6(rig: &mut Rig) -> (u8, u32, u32, Vec<u8>) {
    let sent = rig.sent6();
    assert_eq!(sent.len(), 1, "{} packets were sent", sent.len());
    let ip = Ip::parse(&sent[0]).unwrap();
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&ip.source.into(), &ip.destination.into()));
    (
        ip.payload()[13] & 0x3f,
        tcp.seq_number().0 as u32,
        tcp.ack_number().0 as u32,
        tcp.payload().to_vec(),
    )
}

// Other guests.

fn datagram6(from: (usize, u16), to: (usize, u16), payload: &[u8]) -> Vec<u8> {
    let whole = town::datagram(from, to, payload);
    packet(&address6(from.0), &address6(to.0), 17, 64, &whole[20..])
}

fn between(from: usize, to: usize, message: &[u8]) -> Vec<u8> {
    packet(&address6(from), &address6(to), 58, 64, message)
}

#[test]
fn of_a_closed_neighbour_its_own_mac_address_is_told_and_nothing_reaches_it() {
    let mut town = Town::dual();
    let target = address6(BOB);
    let question = neighbour(135, 0, &target, Some((1, town::mac(ANN))));
    let group = ndp::solicited_node(ip6(&target)).to_string();
    let group_mac = Mac([0x33, 0x33, 0xff, 0, 0, 3]);
    town.frame(
        ANN,
        group_mac,
        0x86dd,
        &packet(&address6(ANN), &group, 58, 255, &question),
    );
    let frames = town.frames(ANN);
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0][6..12], town::mac(BOB).0);
    let ip = Ip::parse(&frames[0][14..]).unwrap();
    assert_eq!(ip.source.to_string(), target);
    assert_eq!((ip.payload()[0], ip.payload()[4]), (136, 0x60), "no router");
    assert_eq!(ip.payload()[26..32], town::mac(BOB).0);
    town.frame(
        ANN,
        town::mac(BOB),
        0x86dd,
        &packet(&address6(ANN), &target, 58, 255, &question),
    );
    assert_eq!(town.frames(ANN).len(), 1, "asked directly");
    town.frame(ANN, group_mac, 0x86dd, &probe(&target));
    assert_eq!(town.frames(ANN)[0][..2], [0x33, 0x33], "taken");
    assert!(town.frames(BOB).is_empty());
}

#[test]
fn a_flow_to_another_guest_is_asked_for_and_filtered_like_over_ipv4() {
    let mut town = Town::dual();
    let (ann, bob) = ((ANN, 40_000), (BOB, 53));
    let question = datagram6(ann, bob, b"question");
    town.frame(ANN, town::mac(BOB), 0x86dd, &question);
    let miss = town.answer_only(ANN, VerdictAction::Allow);
    assert!(town::has_guest_guard(&miss));
    assert_eq!(flow(&miss).peer_vm, Some(town::vm(BOB)));
    assert_eq!(town.packets(BOB), [question]);
    let answer = datagram6(bob, ann, b"answer");
    town.frame(BOB, town::mac(ANN), 0x86dd, &answer);
    assert_eq!(town.packets(ANN), std::slice::from_ref(&answer));
    town.frame(
        BOB,
        town::mac(ANN),
        0x86dd,
        &datagram6((BOB, 54), ann, b"unasked"),
    );
    assert_eq!(town.misses(BOB).len(), 1, "a flow of its own");
    assert!(town.packets(ANN).is_empty());

    // An error about the flow passes; about anything else it does not.
    let about = |packet: &[u8]| [&[1, 4, 0, 0, 0, 0, 0, 0], packet].concat();
    let error = between(ANN, BOB, &about(&answer));
    town.frame(ANN, town::mac(BOB), 0x86dd, &error);
    assert_eq!(town.packets(BOB), [error]);
    let made_up = between(ANN, BOB, &about(&datagram6(bob, (ANN, 1), b"x")));
    town.frame(ANN, town::mac(BOB), 0x86dd, &made_up);
    assert!(town.packets(BOB).is_empty());
}

#[test]
fn echo_between_guests_passes_with_its_answer() {
    let mut town = Town::dual();
    let question = between(ANN, BOB, &[128, 0, 0, 0, 0, 77, 0, 1]);
    town.frame(ANN, town::mac(BOB), 0x86dd, &question);
    town.answer_only(ANN, VerdictAction::Allow);
    assert_eq!(town.packets(BOB), [question]);
    let answer = between(BOB, ANN, &[129, 0, 0, 0, 0, 77, 0, 1]);
    town.frame(BOB, town::mac(ANN), 0x86dd, &answer);
    assert_eq!(town.packets(ANN), [answer]);
    town.frame(
        BOB,
        town::mac(ANN),
        0x86dd,
        &between(BOB, ANN, &[129, 0, 0, 0, 0, 78, 0, 1]),
    );
    assert!(town.packets(ANN).is_empty(), "an answer to nothing");
}

#[test]
fn what_came_in_fragments_leaves_in_fragments_to_another_guest() {
    let mut town = Town::dual();
    let whole = datagram6((ANN, 1000), (BOB, 2000), &[7; 3000]);
    let body = &whole[40..];
    for (offset, more) in [(0usize, true), (1448, true), (2896, false)] {
        let end = if more { offset + 1448 } else { body.len() };
        let [high, low] = (offset as u16 | u16::from(more)).to_be_bytes();
        let part = [&[17, 0, high, low, 0, 0, 0, 9][..], &body[offset..end]].concat();
        town.frame(
            ANN,
            town::mac(BOB),
            0x86dd,
            &packet(&address6(ANN), &address6(BOB), 44, 64, &part),
        );
    }
    town.answer_only(ANN, VerdictAction::Allow);
    let mut put_together = vec![0; body.len()];
    for packet in town.packets(BOB) {
        assert!(packet.len() <= 1500);
        let ip = Ip::parse(&packet).unwrap();
        let part = ip.part.unwrap();
        let offset = usize::from(part.offset);
        assert_eq!(part.more, offset + ip.payload().len() < body.len());
        put_together[offset..][..ip.payload().len()].copy_from_slice(ip.payload());
    }
    assert_eq!(put_together, body);
}

#[test]
fn open_neighbours_reach_each_other_plainly_also_through_their_router() {
    let mut town = Town::dual();
    town.settings(ANN, true, false);
    town.settings(BOB, true, false);
    let packet = datagram6((ANN, 1), (BOB, 2), b"hello");
    for to in [town::mac(BOB), GATEWAY_MAC] {
        town.frame(ANN, to, 0x86dd, &packet);
        let frames = town.frames(BOB);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0][14..], packet);
    }
    assert!(town.misses(ANN).is_empty());
}
