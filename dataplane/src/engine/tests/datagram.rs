//! UDP and ICMP echo as the guest meets them.

use std::time::Duration;

use vnet_proto::model::VerdictAction;

use super::kit::*;
use crate::engine::frame::DropReason;
use crate::engine::held::DATAGRAMS_MAX;
use crate::engine::reply::Unreachable;
use crate::engine::{Event, UDP_FLOWS_MAX, UDP_UNANSWERED_IDLE};
use crate::message::{FlowEnd, Report};

const NTP: (std::net::Ipv4Addr, u16) = (SERVER, 123);

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

#[test]
fn the_first_datagrams_of_a_held_flow_are_sent_in_order_once_allowed() {
    let mut rig = Rig::new();
    for i in 0..6u8 {
        rig.ip(&udp(NTP, &[i]));
    }
    let misses = rig.misses();
    assert_eq!(misses.len(), 1);
    assert_eq!(
        rig.engine.dropped(DropReason::HeldLimit),
        6 - DATAGRAMS_MAX as u64
    );
    rig.answer(&misses[0], VerdictAction::Allow);
    assert_eq!(payloads(&mut rig), [[0], [1], [2], [3]]);
    rig.ip(&udp(NTP, &[9]));
    assert_eq!(payloads(&mut rig), [[9]]);
}

#[test]
fn a_denied_datagram_is_answered_as_prohibited() {
    let mut rig = Rig::new();
    rig.ip(&udp(NTP, b"x"));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Deny);
    assert_eq!(rig.only_icmp(), (3, 13));
    rig.ip(&udp(NTP, b"x"));
    assert_eq!(rig.only_icmp(), (3, 13));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn an_unanswered_hold_of_a_datagram_ends_prohibited() {
    let mut rig = Rig::new();
    rig.ip(&udp(NTP, b"x"));
    rig.wait(HOLD);
    assert_eq!(rig.only_icmp(), (3, 13));
}

#[test]
fn answers_come_from_the_peer_and_idle_associations_end() {
    let mut rig = Rig::new();
    rig.ip(&udp(NTP, b"x"));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let Some(Event::Send { flow, .. }) = rig.events.pop() else {
        panic!()
    };
    rig.engine.handle_datagram(rig.now, flow, b"answer");
    assert_eq!(rig.only_datagram(), (123, b"answer".to_vec()));
    rig.reports();
    rig.wait(UDP_UNANSWERED_IDLE + Duration::from_secs(1));
    assert_eq!(rig.engine.flow_count(), 1, "an answered association lives longer");
    rig.wait(Duration::from_secs(120));
    assert!(rig.reports().iter().any(|r| matches!(
        r,
        Report::FlowClosed {
            end: FlowEnd::Idle,
            ..
        }
    )));
}

#[test]
fn fragments_are_put_together_before_ports_are_looked_at() {
    let mut rig = Rig::new();
    let whole = udp(NTP, &[7; 2000]);
    let mut first = whole[..20 + 1480].to_vec();
    first[2..4].copy_from_slice(&1500u16.to_be_bytes());
    first[6..8].copy_from_slice(&0x2000u16.to_be_bytes());
    let mut second = whole[..20].to_vec();
    second.extend_from_slice(&whole[20 + 1480..]);
    let length = second.len() as u16;
    second[2..4].copy_from_slice(&length.to_be_bytes());
    second[6..8].copy_from_slice(&185u16.to_be_bytes());
    rig.ip(&second);
    assert!(rig.misses().is_empty(), "a later fragment alone opens nothing");
    rig.ip(&first);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(payloads(&mut rig), [vec![7; 2000]]);
}

#[test]
fn echo_to_the_gateway_is_answered_and_beyond_it_asks() {
    let mut rig = Rig::new();
    rig.ip(&echo(GATEWAY, 77, b"ping"));
    assert_eq!(rig.only_icmp(), (0, 0));
    rig.ip(&echo(SERVER, 77, b"ping"));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let Some(Event::Send { flow, packets }) = rig.events.pop() else {
        panic!()
    };
    assert_eq!(&packets[0][8..], b"ping");
    let mut reply = packets[0].to_vec();
    reply[0] = 0;
    reply[4..6].copy_from_slice(&[0xab, 0xcd]);
    rig.engine.handle_echo_reply(rig.now, flow, &mut reply);
    let sent = rig.sent();
    assert_eq!(sent[0][24..26], 77u16.to_be_bytes(), "the guest's own identifier");
}

#[test]
fn a_denied_echo_is_answered_as_prohibited() {
    let mut rig = Rig::new();
    rig.ip(&echo(SERVER, 77, b"ping"));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Deny);
    assert_eq!(rig.only_icmp(), (3, 13));
}

#[test]
fn what_the_host_cannot_send_is_counted_and_said_as_the_host_says_it() {
    for (why, said) in [
        (Unreachable::Port, (3, 3)),
        (Unreachable::Host, (3, 1)),
        (Unreachable::Network, (3, 0)),
    ] {
        let mut rig = Rig::new();
        rig.ip(&udp(NTP, b"x"));
        let miss = rig.misses().remove(0);
        rig.answer(&miss, VerdictAction::Allow);
        let Some(Event::Send { flow, .. }) = rig.events.pop() else {
            panic!()
        };
        rig.engine.handle_send_error(flow, Some(why));
        assert_eq!(rig.only_icmp(), said);
        assert_eq!(rig.engine.dropped(DropReason::HostRefused), 1);
    }
    // No ping socket is to be had: counted, and nothing is made up.
    let mut rig = Rig::new();
    rig.ip(&echo(SERVER, 77, b"ping"));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let Some(Event::Send { flow, .. }) = rig.events.pop() else {
        panic!()
    };
    rig.engine.handle_send_error(flow, None);
    assert_eq!(rig.engine.dropped(DropReason::HostRefused), 1);
    assert!(rig.sent().is_empty());
}

#[test]
fn other_icmp_and_odd_protocols_are_dropped() {
    let mut rig = Rig::new();
    rig.ip(&ipv4(GUEST, SERVER, 1, &[5, 0, 0, 0, 0, 0, 0, 0]));
    rig.ip(&ipv4(GUEST, SERVER, 132, &[0; 12]));
    rig.ip(&ipv4(GUEST, SERVER, 47, &[0; 12]));
    assert_eq!(rig.engine.dropped(DropReason::IpProtocol), 3);
    assert!(rig.misses().is_empty() && rig.sent().is_empty());
}

#[test]
fn gateway_ports_other_than_dns_and_dhcp_are_closed() {
    let mut rig = Rig::new();
    rig.ip(&udp((GATEWAY, 123), b"x"));
    assert_eq!(rig.only_icmp(), (3, 3));
    assert_eq!(rig.engine.dropped(DropReason::GatewayService), 1);
}

#[test]
fn many_associations_stay_bounded() {
    // The rig's flow table is smaller than the limit of associations; both hold.
    const { assert!(UDP_FLOWS_MAX > 64) }
    let mut rig = Rig::new();
    for port in 1..=100u16 {
        rig.ip(&udp((SERVER, port), b"x"));
        for miss in rig.misses() {
            rig.answer(&miss, VerdictAction::Allow);
        }
    }
    assert!(rig.engine.flow_count() <= 64);
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 36);
}
