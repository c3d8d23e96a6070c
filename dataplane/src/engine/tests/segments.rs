//! Headers of TCP that no ordinary stack sends, and what a SYN brings along: what is asked, kept and dialled.

use std::convert::Infallible;

use smoltcp::wire::{Ipv4Packet, TcpPacket};
use vnet_proto::model::VerdictAction;

use super::ipv6::{self, GUEST6};
use super::kit::*;
use super::town::{self, ANN, BOB, Town, end};
use crate::engine::Event;
use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;

const WEB: (std::net::Ipv4Addr, u16) = (SERVER, 80);
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

#[test]
fn a_syn_that_closes_or_resets_as_well_is_dropped_and_opens_nothing() {
    let mut rig = Rig::dual();
    let odd: Vec<u8> = (0..=255)
        .filter(|flags| flags & SYN != 0 && flags & (FIN | RST) != 0)
        .collect();
    for flags in &odd {
        for destination in [SERVER, GATEWAY] {
            rig.tcp((destination, 53), *flags, 1000, 0, &[]);
        }
        let six = segment(WEB, *flags, 1000, 0, &[])[20..].to_vec();
        rig.frame(0x86dd, &ipv6::packet(GUEST6, "2001:db8::9", 6, 64, &six));
    }
    assert_eq!(rig.engine.dropped(DropReason::Malformed), 3 * odd.len() as u64);
    assert!(rig.misses().is_empty() && rig.sent().is_empty() && rig.events.is_empty());
    assert_eq!(rig.engine.flow_count(), 0);

    // What is allowed is not dialled by one either.
    let (at, sequence) = rig.connect(WEB);
    let mut second = segment(WEB, SYN | FIN, 5000, 0, &[]);
    second[21] ^= 1;
    rig.ip(&second);
    // Nor does one end a connection, or a flow that waits.
    rig.syn((SERVER, 81));
    for flags in odd {
        rig.tcp(WEB, flags, 9000, sequence, &[]);
        rig.tcp((SERVER, 81), flags, 9000, 0, &[]);
    }
    rig.service();
    assert!(rig.sent().is_empty());
    assert!(
        !rig.events
            .iter()
            .any(|e| matches!(e, Event::Dial { .. } | Event::Close { .. }))
    );
    assert!(rig.engine.connection(at).is_some());
    assert_eq!(rig.engine.flow_count(), 2);
}

#[test]
fn of_all_combinations_of_flags_only_a_bare_syn_asks() {
    let mut rig = Rig::new();
    for flags in 0..=255u8 {
        rig.tcp(WEB, flags, 1000, 7, &[]);
        let opens = flags & (FIN | SYN | RST | ACK) == SYN;
        assert_eq!(rig.misses().len(), usize::from(opens), "{flags:#04x}");
        let sent = rig.sent();
        if opens {
            assert!(sent.is_empty(), "{flags:#04x}");
            rig.tcp(WEB, RST, 1001, 0, &[]);
            rig.events.clear();
        } else if flags & RST != 0 || flags & (SYN | FIN) == SYN | FIN {
            assert!(sent.is_empty(), "{flags:#04x}: nothing answers it");
        } else {
            assert_eq!(sent.len(), 1, "{flags:#04x}");
            assert_eq!(sent[0][33] & RST, RST, "{flags:#04x}: nobody knows of it");
        }
        assert_eq!(rig.engine.flow_count(), 0, "{flags:#04x}");
    }
}

#[test]
fn what_a_syn_carries_is_not_kept_while_its_flow_waits_and_arrives_once() {
    let mut rig = Rig::with_mtu(65_520);
    let data = vec![7; 60_000];
    rig.tcp(WEB, SYN, 1000, 0, &data);
    let kept = |rig: &Rig, at: usize| match &rig.engine.flow(at).unwrap().state {
        State::Held(waiting) => waiting.packets.iter().map(|p| p.len()).sum::<usize>(),
        State::Dialing { syn, .. } => syn.len(),
        _ => panic!("neither held nor dialling"),
    };
    let miss = rig.misses().remove(0);
    assert_eq!(kept(&rig, 0), 48);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    assert_eq!(kept(&rig, at), 48);

    // By the cache as well.
    let mut second = segment(WEB, SYN, 5000, 0, &data);
    second[21] ^= 1;
    rig.ip(&second);
    let (other, _) = rig.only_dial();
    assert_eq!(kept(&rig, other), 48);

    // Only the SYN is acknowledged, so that the guest sends it again.
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (flags, sequence, acknowledgement, _) = rig.only_segment();
    assert_eq!((flags, acknowledgement), (SYN | ACK, 1001));
    rig.tcp(WEB, 0x18, 1001, sequence + 1, b"hello");
    let mut got = Vec::new();
    let taken = rig.engine.connection(at).unwrap().lend_received(|bytes| {
        got.extend_from_slice(bytes);
        Ok::<_, Infallible>(bytes.len())
    });
    assert_eq!((taken, got.as_slice()), (Ok(5), b"hello".as_slice()));
}

#[test]
fn a_refused_syn_with_bytes_is_refused_in_a_way_that_the_guest_believes() {
    let mut rig = Rig::new();
    rig.tcp(WEB, SYN, 1000, 0, b"early");
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Deny);
    // RFC 9293 §3.10.7.3: the acknowledgement must be within what was sent.
    let (flags, _, acknowledgement, _) = rig.only_segment();
    assert_eq!(flags, RST | ACK);
    assert!((1001..=1006).contains(&acknowledgement));
}

#[test]
fn what_is_kept_of_a_long_syn_holds_together_for_another_guest() {
    let mut town = Town::new();
    let early = vec![7; crate::engine::held::DATAGRAM_BYTES_MAX];
    let whole = town::segment((ANN, 40_000), (BOB, 80), SYN, (1000, 0), &early);
    town.ip(ANN, &whole);
    town.answer_only(ANN, VerdictAction::Allow);
    let packets = town.packets(BOB);
    assert_eq!(packets.len(), 1);
    let ip = Ipv4Packet::new_checked(&packets[0]).unwrap();
    assert!(ip.verify_checksum());
    assert_eq!(usize::from(ip.total_len()), packets[0].len());
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
    assert!(tcp.syn() && tcp.payload().is_empty());
    assert_eq!((ip.dst_addr(), tcp.dst_port()), (*end(BOB, 80).ip(), 80));
    // The answer passes as ever.
    town.tcp((BOB, 80), (ANN, 40_000), SYN | ACK, (5000, 1001));
    assert_eq!(town.only_segment(ANN), (SYN | ACK, 5000, 1001));
}

#[test]
fn what_is_kept_of_a_syn_over_ipv6_says_its_length() {
    let mut rig = Rig::dual();
    let early = segment(WEB, SYN, 1000, 0, b"early")[20..].to_vec();
    rig.frame(0x86dd, &ipv6::packet(GUEST6, "2001:db8::9", 6, 64, &early));
    assert_eq!(rig.misses().len(), 1);
    let State::Held(waiting) = &rig.engine.flow(0).unwrap().state else {
        panic!("not held")
    };
    let ip = Ip::parse(&waiting.packets[0]).unwrap();
    assert_eq!(ip.payload().len(), 28);
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    assert!(tcp.verify_checksum(&ip.source.into(), &ip.destination.into()));
    assert!(tcp.payload().is_empty());
}

#[test]
fn a_syn_without_options_is_answered_in_small_segments() {
    let mut rig = Rig::new();
    let mut plain = segment(WEB, ACK, 1000, 0, &[]);
    plain[33] = SYN;
    rig.ip(&plain);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (flags, sequence, acknowledgement, _) = rig.only_segment();
    assert_eq!((flags, acknowledgement), (SYN | ACK, 1001));
    rig.tcp(WEB, ACK, 1001, sequence + 1, &[]);
    let filled = rig.engine.connection(at).unwrap().lend_room(|room| {
        room.fill(7);
        Ok::<_, Infallible>(room.len())
    });
    assert!(filled.unwrap() > 536);
    rig.engine.finish_service(rig.now, at);
    let sent = rig.sent();
    // RFC 9293 §3.7.1: 536 bytes, where nothing is said.
    assert!(!sent.is_empty() && sent.iter().all(|p| p.len() <= 20 + 20 + 536));
}

#[test]
fn options_that_lie_cost_a_refusal_and_nothing_else() {
    for options in [
        [2, 4, 0, 0, 1, 1, 1, 1],
        [2, 0, 0, 0, 0, 0, 0, 0],
        [3, 3, 255, 1, 2, 9, 1, 1],
    ] {
        let mut rig = Rig::new();
        let mut odd = segment(WEB, SYN, 1000, 0, &[]);
        odd[40..48].copy_from_slice(&options);
        rig.ip(&odd);
        let miss = rig.misses().remove(0);
        rig.answer(&miss, VerdictAction::Allow);
        let (at, _) = rig.only_dial();
        rig.engine.handle_dialled(rig.now, at);
        rig.service();
        assert_eq!(rig.sent().len(), 1, "{options:?}: answered or refused");
        let opened = rig.engine.flow_count();
        let closed = rig
            .events
            .iter()
            .filter(|e| matches!(e, Event::Close { .. }))
            .count();
        assert_eq!(opened + closed, 1, "{options:?}");
    }
}

#[test]
fn a_simultaneous_open_of_a_forward_asks_nothing_and_the_forward_still_opens() {
    let mut rig = Rig::new();
    rig.ip(&udp((GATEWAY, 1), b"here"));
    rig.frames();
    rig.reports();
    let at = rig
        .engine
        .open_ingress(rig.now, None, "192.168.127.2:22".parse().unwrap(), None)
        .unwrap();
    rig.service();
    let (flags, sequence, _, _) = rig.only_segment();
    assert_eq!(flags, SYN);
    let client = rig.engine.flow(at).unwrap().key.peer.port();
    let guest = |flags: u8, acknowledgement: u32| {
        let mut packet = segment((GATEWAY, client), flags, 9000, acknowledgement, &[]);
        packet[20..22].copy_from_slice(&22u16.to_be_bytes());
        packet
    };
    rig.reports();
    rig.ip(&guest(SYN, 0));
    assert!(rig.misses().is_empty() && rig.sent().is_empty());
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    rig.ip(&guest(SYN | ACK, sequence + 1));
    rig.service();
    let (flags, _, acknowledgement, _) = rig.only_segment();
    assert_eq!((flags, acknowledgement), (ACK, 9001));
}
