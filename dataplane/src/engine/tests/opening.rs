//! What opens nothing: packets that begin no flow, and what one allowed flow would lend to another.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use vnet_proto::model::{CommandId, Miss, VerdictAction};

use super::ipv6;
use super::kit::*;
use crate::engine::frame::DropReason;
use crate::engine::{Event, Outcome};
use crate::message::{DnsSettings, Order, Settings};

const WEB: (Ipv4Addr, u16) = (SERVER, 443);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn leaves(rig: &Rig) -> bool {
    rig.events.iter().any(|e| {
        matches!(
            e,
            Event::Dial { .. } | Event::Send { .. } | Event::Pass { .. } | Event::Resolve { .. }
        )
    })
}

fn sent_up(rig: &mut Rig) -> usize {
    let events = std::mem::take(&mut rig.events);
    events.iter().filter(|e| matches!(e, Event::Send { .. })).count()
}

fn only(mut misses: Vec<Miss>) -> Miss {
    assert_eq!(misses.len(), 1);
    misses.remove(0)
}

#[test]
fn a_socket_that_reached_one_peer_asks_about_every_other() {
    let mut rig = Rig::new();
    rig.ip(&udp(WEB, b"one"));
    let miss = only(rig.misses());
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(sent_up(&mut rig), 1);
    for other in [
        (ELSEWHERE, 443),
        (SERVER, 444),
        (SERVER, 80),
        (Ipv4Addr::new(203, 0, 113, 8), 443),
    ] {
        // From the same port, as a QUIC connection that moves on.
        rig.ip(&udp(other, b"two"));
        let miss = only(rig.misses());
        assert!(!leaves(&rig), "{other:?}");
        rig.answer(&miss, VerdictAction::Deny);
        rig.ip(&udp(other, b"three"));
        assert!(rig.misses().is_empty() && !leaves(&rig), "{other:?}");
    }
    rig.ip(&udp(WEB, b"four"));
    assert_eq!(sent_up(&mut rig), 1, "what was allowed still is");
    // Nor does it lend itself to a connection or to echo.
    rig.syn(WEB);
    only(rig.misses());
    rig.ip(&echo(SERVER, 1, b"x"));
    only(rig.misses());
    assert!(!leaves(&rig));
}

#[test]
fn a_cut_association_asks_again_before_anything_is_sent() {
    let mut rig = Rig::new();
    rig.ip(&udp(WEB, b"one"));
    let miss = only(rig.misses());
    rig.answer(&miss, VerdictAction::Allow);
    let Some(Event::Send { flow, .. }) = rig.events.pop() else {
        panic!("nothing was sent")
    };
    let id = rig.engine.flow(flow).unwrap().id;
    rig.order(Order::Revoke {
        command: None,
        epoch: EPOCH.next(),
    });
    rig.order(Order::Cut {
        command: CommandId(1),
        flows: vec![id],
    });
    rig.reports();
    rig.events.clear();
    rig.ip(&udp(WEB, b"two"));
    only(rig.misses());
    assert!(!leaves(&rig));
}

#[test]
fn datagrams_to_everybody_or_to_port_0_go_nowhere() {
    let mut rig = Rig::new();
    let everybody = [
        (Ipv4Addr::BROADCAST, 9),
        (Ipv4Addr::new(224, 0, 0, 251), 5353),
        (Ipv4Addr::new(224, 0, 0, 252), 5355),
        (Ipv4Addr::new(239, 255, 255, 250), 1900),
        (Ipv4Addr::new(192, 168, 127, 255), 137),
    ];
    for peer in everybody.into_iter().chain([(SERVER, 0), (GATEWAY, 0)]) {
        rig.ip(&udp(peer, b"x"));
        assert!(rig.misses().is_empty() && !leaves(&rig), "{peer:?}");
    }
    rig.syn((SERVER, 0));
    assert!(rig.misses().is_empty() && !leaves(&rig));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn no_other_protocol_of_ip_leaves() {
    let mut rig = Rig::new();
    for protocol in (0..=255u8).filter(|p| ![1, 6, 17].contains(p)) {
        rig.ip(&ipv4(GUEST, SERVER, protocol, &[0; 64]));
    }
    for kind in (0..=255u8).filter(|kind| *kind != 8) {
        rig.ip(&ipv4(GUEST, SERVER, 1, &[kind, 0, 0, 0, 0, 0, 0, 0]));
    }
    assert_eq!(rig.engine.dropped(DropReason::IpProtocol), 253 + 255);
    assert!(rig.misses().is_empty() && rig.sent().is_empty() && !leaves(&rig));
}

#[test]
fn of_the_gateways_ports_only_dns_takes_a_connection() {
    let mut rig = Rig::new();
    for port in (1..=u16::MAX).filter(|port| *port != 53) {
        rig.syn((GATEWAY, port));
        let (flags, ..) = rig.only_segment();
        assert_eq!(flags, 0x14, "port {port}");
    }
    assert!(rig.misses().is_empty() && !leaves(&rig));
    assert_eq!(
        rig.engine.dropped(DropReason::GatewayService),
        u64::from(u16::MAX) - 1
    );
}

#[test]
fn of_the_gateways_ports_for_datagrams_only_dns_and_dhcp_take_any() {
    let mut rig = Rig::new();
    for port in (1..=u16::MAX).filter(|port| ![53, 67].contains(port)) {
        rig.ip(&udp((GATEWAY, port), b"x"));
        assert_eq!(rig.only_icmp(), (3, 3), "port {port}");
        assert_eq!(rig.engine.flow_count(), 0, "port {port}");
    }
    // DHCP's and DNS's do not answer what is neither.
    for port in [53, 67] {
        rig.ip(&udp((GATEWAY, port), b"x"));
        assert!(rig.sent().is_empty(), "port {port}");
    }
    assert!(rig.misses().is_empty() && !leaves(&rig));
    assert_eq!(
        rig.engine.dropped(DropReason::GatewayService),
        u64::from(u16::MAX) - 2
    );
}

#[test]
fn of_the_gateways_ports_over_ipv6_only_dns_takes_any() {
    let six = |destination: &str, protocol: u8, whole: &[u8]| {
        ipv6::packet(ipv6::GUEST6, destination, protocol, 64, &whole[20..])
    };
    // Its address in the prefix, and the one on the link.
    for destination in ["fd00::1", "fe80::1"] {
        let mut rig = Rig::dual();
        rig.frame(0x86dd, &six(destination, 17, &udp((GATEWAY, 1), b"here")));
        rig.frames();
        for port in (1..=u16::MAX).filter(|port| *port != 53) {
            rig.frame(
                0x86dd,
                &six(destination, 6, &segment((GATEWAY, port), 2, 1000, 0, &[])),
            );
            let sent = rig.frames();
            assert_eq!((sent.len(), sent[0][14 + 6]), (1, 6), "{destination} {port}");
            assert_eq!(sent[0][14 + 40 + 13], 0x14, "{destination} {port}");
            rig.frame(0x86dd, &six(destination, 17, &udp((GATEWAY, port), b"x")));
            let sent = rig.frames();
            assert_eq!(sent.len(), 1, "{destination} {port}");
            assert_eq!(
                sent[0][14 + 40..14 + 42],
                [1, 4],
                "{destination} {port}: port unreachable"
            );
            assert_eq!(rig.engine.flow_count(), 0, "{destination} {port}");
        }
        assert!(rig.misses().is_empty() && !leaves(&rig));
        assert_eq!(
            rig.engine.dropped(DropReason::GatewayService),
            2 * u64::from(u16::MAX) - 1
        );
    }
}

#[test]
fn multicast_dns_and_llmnr_reach_nobody_over_either_family_and_are_counted() {
    let groups = [
        ("224.0.0.251", "ff02::fb", 5353),
        ("224.0.0.252", "ff02::1:3", 5355),
    ];
    // Where a policy answers other servers' DNS here, too.
    for redirect in [false, true] {
        let mut rig = Rig::dual();
        rig.order(Order::Settings(Settings {
            dns: DnsSettings {
                redirect,
                ..DnsSettings::default()
            },
            ..settings()
        }));
        for (group, group6, port) in groups {
            let (v4, v6): (Ipv4Addr, Ipv6Addr) = (group.parse().unwrap(), group6.parse().unwrap());
            let mut query = vec![0; 12];
            query[5] = 1;
            query.extend_from_slice(b"\x05thing\x05local\0\0\x01\0\x01");
            let packet = udp((v4, port), &query);
            let packet6 = ipv6::packet(ipv6::GUEST6, group6, 17, 255, &packet[20..]);
            let [.., a, b, c] = v4.octets();
            let mac = [0x01, 0x00, 0x5e, a & 0x7f, b, c];
            let [.., a, b, c, d] = v6.octets();
            let mac6 = [0x33, 0x33, a, b, c, d];
            // As stacks send it, and as one does that wants it routed.
            for (to, to6) in [(mac, mac6), (GATEWAY_MAC.0, GATEWAY_MAC.0)] {
                let dropped = |rig: &Rig| {
                    let reasons = [DropReason::GuestToGuest, DropReason::Destination];
                    reasons
                        .iter()
                        .map(|reason| rig.engine.dropped(*reason))
                        .sum::<u64>()
                };
                let before = dropped(&rig);
                for (to, kind, packet) in [(to, [8, 0], &packet), (to6, [0x86, 0xdd], &packet6)] {
                    let frame = [&to[..], &GUEST_MAC.0, &kind, packet].concat();
                    let outcome = rig.engine.handle_frame(rig.now, &frame);
                    assert!(matches!(outcome, Outcome::Done), "{group}");
                }
                assert_eq!(dropped(&rig), before + 2, "{group} counted");
            }
        }
        rig.wait(Duration::ZERO);
        assert!(rig.misses().is_empty() && !leaves(&rig));
        assert_eq!(rig.engine.flow_count(), 0);
        let answers = rig
            .frames()
            .into_iter()
            .filter(|f| f[12..14] == [8, 0] || f[14 + 6] != 58);
        assert_eq!(answers.count(), 0, "nothing is answered");
    }
}

#[test]
fn what_is_allowed_opens_at_once_however_many_misses_wait() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = only(rig.misses());
    rig.answer(&miss, VerdictAction::Allow);
    rig.only_dial();
    // As many as the rig's table has room for, but for one flow.
    for port in 1..=62 {
        rig.ip(&udp((ELSEWHERE, port), b"x"));
        only(rig.misses());
    }
    let mut again = segment(WEB, 2, 5000, 0, &[]);
    again[21] ^= 1;
    rig.ip(&again);
    rig.only_dial();
    assert!(rig.misses().is_empty());
    rig.wait(Duration::from_millis(1));
}
