//! Destinations that are dialled at others, and addresses that the gateway answers for beside its own.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use vnet_proto::model::{
    FlowMatch, FlowSubject, Guard, Match, Miss, PortRange, Protocol, Subject, VerdictAction,
};

use super::kit::*;
use crate::engine::Event;
use crate::engine::frame::DropReason;
use crate::engine::nat::Nat;

/// Outside of the subnet, dialled at an address beyond the host.
const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 50);
const FAR_TO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Outside of the subnet, dialled at the host's loopback.
const LOOPBACK: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 51);
/// Outside of the subnet, dialled at an IPv6 address.
const SIX: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 52);
/// Virtual, and dialled nowhere else: in the subnet, and outside of it.
const INSIDE: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 250);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);

fn rig() -> Rig {
    let mut rig = Rig::new();
    let nat = [
        (ALIAS, Ipv4Addr::LOCALHOST.into()),
        (FAR, FAR_TO.into()),
        (LOOPBACK, Ipv4Addr::LOCALHOST.into()),
        (SIX, "2001:db8::7".parse().unwrap()),
    ];
    rig.engine.config.nat = Arc::new(Nat::new(nat, [ALIAS, INSIDE, OUTSIDE]));
    rig
}

fn flow(miss: &Miss) -> &FlowSubject {
    match &miss.subject {
        Subject::Flow(flow) => flow,
        Subject::Lookup(_) => panic!("{miss:?}"),
    }
}

#[test]
fn a_connection_is_dialled_at_the_other_address_and_judged_by_both() {
    let mut rig = rig();
    rig.syn((FAR, 443));
    let miss = rig.misses().remove(0);
    assert_eq!(flow(&miss).key.peer, (FAR, 443).into());
    assert_eq!(flow(&miss).dialled, IpAddr::from(FAR_TO));
    assert!(flow(&miss).guards.is_empty());
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(rig.only_dial().1, (FAR_TO, 443).into());
}

#[test]
fn a_datagram_goes_to_the_other_address_and_its_answer_comes_from_the_one_that_was_asked() {
    let mut rig = rig();
    rig.ip(&udp((FAR, 123), b"time?"));
    let miss = rig.misses().remove(0);
    assert_eq!(flow(&miss).dialled, IpAddr::from(FAR_TO));
    rig.answer(&miss, VerdictAction::Allow);
    let at = sent_on(&mut rig);
    assert_eq!(rig.engine.flow(at).unwrap().dialled, (FAR_TO, 123).into());
    rig.engine.handle_datagram(rig.now, at, b"now");
    let answer = rig.sent().remove(0);
    assert_eq!(answer[12..16], FAR.octets(), "the address that the guest knows");
}

#[test]
fn an_echo_request_goes_to_the_other_address_of_its_own_family_alone() {
    let mut rig = rig();
    rig.ip(&echo(FAR, 77, b"ping"));
    let miss = rig.misses().remove(0);
    assert_eq!(
        (flow(&miss).key.protocol, flow(&miss).dialled),
        (Protocol::Icmp, IpAddr::from(FAR_TO))
    );
    rig.answer(&miss, VerdictAction::Allow);
    let at = sent_on(&mut rig);
    assert_eq!(rig.engine.flow(at).unwrap().dialled.ip(), IpAddr::from(FAR_TO));

    rig.ip(&echo(SIX, 77, b"ping"));
    assert_eq!(rig.only_icmp(), (3, 1));
    assert!(rig.misses().is_empty(), "nobody is asked about what cannot be");
    rig.syn((SIX, 443));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(rig.only_dial().1, "[2001:db8::7]:443".parse().unwrap());
}

/// The flow that something was sent on.
fn sent_on(rig: &mut Rig) -> usize {
    let sends = std::mem::take(&mut rig.events).into_iter();
    let sends = sends.filter_map(|event| match event {
        Event::Send { flow, .. } => Some(flow),
        _ => None,
    });
    let [at] = sends.collect::<Vec<_>>()[..] else {
        panic!("not one send")
    };
    at
}

#[test]
fn guards_are_those_of_what_is_dialled() {
    let mut rig = rig();
    rig.syn((LOOPBACK, 80));
    let miss = rig.misses().remove(0);
    assert_eq!(flow(&miss).guards.iter().collect::<Vec<_>>(), [Guard::Host]);
    // Where a daemon listens, nothing leads.
    rig.syn((FAR, 4444));
    assert_eq!(rig.only_segment().0, 0x14);
    assert!(rig.misses().is_empty());
}

#[test]
fn no_verdict_about_its_neighbours_lets_it_through() {
    let mut rig = rig();
    rig.syn((SERVER, 80));
    let miss = rig.misses().remove(0);
    let mut wide = verdict(&miss, VerdictAction::Allow);
    wide.found = Match::Flow(FlowMatch {
        protocol: Protocol::Tcp,
        prefix: "203.0.113.0/24".parse().unwrap(),
        ports: PortRange::ALL,
        names_consulted: false,
    });
    rig.order(crate::message::Order::Verdict(Box::new(wide)));
    rig.only_dial();
    rig.syn((Ipv4Addr::new(203, 0, 113, 49), 80));
    rig.only_dial();
    // Those of the same prefix that lead elsewhere are asked about, whatever guards them.
    for moved in [FAR, LOOPBACK] {
        rig.syn((moved, 80));
        assert_eq!(rig.misses().len(), 1, "{moved}");
    }
}

#[test]
fn a_verdict_about_it_answers_for_it_again() {
    let mut rig = rig();
    rig.syn((FAR, 443));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Deny);
    rig.sent();
    rig.tcp((FAR, 443), 2, 5000, 0, &[]);
    assert_eq!(rig.only_segment().0, 0x14);
    assert!(rig.misses().is_empty());
}

#[test]
fn the_gateway_answers_arp_for_virtual_addresses_wherever_they_lie() {
    let mut rig = rig();
    for target in [INSIDE, OUTSIDE, ALIAS] {
        rig.frame(0x0806, &arp(GUEST, target));
        let frames = rig.frames();
        assert_eq!(frames.len(), 1, "{target}");
        assert_eq!(frames[0][6..12], GATEWAY_MAC.0);
        assert_eq!(frames[0][28..32], target.octets());
    }
    for other in [FAR, Ipv4Addr::new(10, 9, 9, 10)] {
        rig.frame(0x0806, &arp(GUEST, other));
        assert!(rig.frames().is_empty(), "{other}");
    }
}

fn arp(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend_from_slice(&GUEST_MAC.0);
    arp.extend_from_slice(&sender.octets());
    arp.extend_from_slice(&[0; 6]);
    arp.extend_from_slice(&target.octets());
    arp
}

#[test]
fn a_virtual_address_is_no_guests_and_leads_to_itself_or_nowhere() {
    let mut rig = rig();
    rig.frame(0x0806, &arp(INSIDE, GATEWAY));
    assert_eq!(rig.engine.dropped(DropReason::SpoofedAddress), 1);
    // In the subnet it stands for nothing: the host's network is not asked about an address of the guests'.
    rig.syn((INSIDE, 80));
    assert_eq!(rig.only_icmp(), (3, 1));
    rig.ip(&echo(INSIDE, 7, b"ping"));
    assert_eq!(
        rig.only_icmp(),
        (3, 1),
        "the gateway answers echo to its own address alone"
    );
    assert!(rig.misses().is_empty());
    // Outside of it, it is a destination like any other.
    rig.syn((OUTSIDE, 80));
    let miss = rig.misses().remove(0);
    assert_eq!(flow(&miss).dialled, IpAddr::from(OUTSIDE));
}
