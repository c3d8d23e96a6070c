//! Who a guest may be.

use std::net::Ipv4Addr;

use super::kit::*;
use crate::engine::Outcome;
use crate::engine::frame::DropReason;
use crate::mac::Mac;
use crate::message::{Order, Report, Settings};
use std::time::Duration;

fn arp(operation: u8, sender_mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    packet.extend_from_slice(&sender_mac.0);
    packet.extend_from_slice(&sender.octets());
    packet.extend_from_slice(&[0; 6]);
    packet.extend_from_slice(&target.octets());
    packet
}

#[test]
fn the_gateway_answers_arp_for_itself_and_the_alias_only() {
    let mut rig = Rig::new();
    for (target, answered) in [
        (GATEWAY, true),
        (ALIAS, true),
        (Ipv4Addr::new(192, 168, 127, 77), false),
    ] {
        rig.frame(0x0806, &arp(1, GUEST_MAC, GUEST, target));
        let frames = rig.frames();
        assert_eq!(frames.len(), usize::from(answered), "{target}");
        if answered {
            assert_eq!(frames[0][22..28], GATEWAY_MAC.0);
            assert_eq!(frames[0][28..32], target.octets());
        }
    }
}

#[test]
fn the_first_mac_is_the_links_and_others_are_dropped() {
    let mut rig = Rig::new();
    rig.frame(0x0806, &arp(1, GUEST_MAC, GUEST, GATEWAY));
    rig.frames();
    rig.frame_from(
        Mac([2, 0, 0, 0, 0, 3]),
        0x0806,
        &arp(1, Mac([2, 0, 0, 0, 0, 3]), GUEST, GATEWAY),
    );
    assert!(rig.frames().is_empty());
    assert_eq!(rig.engine.dropped(DropReason::SpoofedMac), 1);
    rig.frame(0x0806, &arp(1, Mac([2, 0, 0, 0, 0, 3]), GUEST, GATEWAY));
    assert_eq!(
        rig.engine.dropped(DropReason::SpoofedMac),
        2,
        "ARP that contradicts its frame"
    );
}

#[test]
fn a_pinned_link_takes_its_own_mac_and_no_other_that_comes_first() {
    let own = Mac([2, 0, 0, 0, 0, 9]);
    let mut rig = Rig::pinned(own);
    rig.frame(0x0806, &arp(1, GUEST_MAC, GUEST, GATEWAY));
    assert!(rig.frames().is_empty());
    assert_eq!(rig.engine.dropped(DropReason::SpoofedMac), 1);
    rig.frame_from(own, 0x0806, &arp(1, own, GUEST, GATEWAY));
    assert_eq!(rig.frames().len(), 1, "ARP is answered");
}

#[test]
fn a_static_address_works_and_others_addresses_do_not() {
    let mut rig = Rig::new();
    let neighbour = Ipv4Addr::new(192, 168, 127, 3);
    *rig.surroundings.neighbour.lock().unwrap() = Some(neighbour);
    let mine = Ipv4Addr::new(192, 168, 127, 50);
    rig.ip(&ipv4(mine, SERVER, 17, &udp((SERVER, 9), b"x")[20..]));
    assert_eq!(rig.misses().len(), 1);
    for spoofed in [
        neighbour,
        GATEWAY,
        ALIAS,
        SERVER,
        Ipv4Addr::new(192, 168, 127, 255),
        Ipv4Addr::UNSPECIFIED,
    ] {
        rig.ip(&ipv4(spoofed, SERVER, 17, &udp((SERVER, 9), b"x")[20..]));
    }
    assert_eq!(rig.engine.dropped(DropReason::SpoofedAddress), 6);
    assert!(rig.misses().is_empty());
}

#[test]
fn one_link_binds_few_addresses() {
    let mut rig = Rig::new();
    for host in 10..30 {
        rig.ip(&ipv4(
            Ipv4Addr::new(192, 168, 127, host),
            SERVER,
            17,
            &udp((SERVER, 9), b"x")[20..],
        ));
    }
    assert_eq!(rig.engine.dropped(DropReason::AddressLimit), 4);
}

#[test]
fn an_address_that_nobody_has_is_unreachable() {
    let mut rig = Rig::new();
    let neighbour = Ipv4Addr::new(192, 168, 127, 3);
    *rig.surroundings.neighbour.lock().unwrap() = Some(neighbour);
    rig.syn((neighbour, 22));
    assert_eq!(rig.misses().len(), 1, "somebody has it");
    rig.syn((Ipv4Addr::new(192, 168, 127, 4), 22));
    assert!(rig.misses().is_empty());
    assert_eq!(rig.engine.dropped(DropReason::UnknownStation), 1);
    assert_eq!(rig.only_icmp(), (3, 1));
}

#[test]
fn on_an_open_switch_frames_pass_but_for_dhcp_answers() {
    let mut rig = Rig::new();
    rig.order(Order::Settings(Settings {
        switch_open: true,
        ..settings()
    }));
    let neighbour = Mac([2, 0, 0, 0, 0, 3]);
    let mut frame = [neighbour.0, GUEST_MAC.0].concat();
    frame.extend_from_slice(&[8, 0]);
    frame.extend_from_slice(&udp((Ipv4Addr::new(192, 168, 127, 3), 9), b"x"));
    assert!(matches!(rig.engine.handle_frame(rig.now, &frame), Outcome::Switch(to) if to == neighbour));
    frame[34..36].copy_from_slice(&67u16.to_be_bytes());
    assert!(matches!(rig.engine.handle_frame(rig.now, &frame), Outcome::Done));
    assert_eq!(rig.engine.dropped(DropReason::RogueDhcp), 1);
}

#[test]
fn ipv6_goes_nowhere() {
    let mut rig = Rig::new();
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
    packet.extend_from_slice(&[0; 32]);
    rig.frame(0x86dd, &packet);
    assert_eq!(rig.engine.dropped(DropReason::Ipv6), 1);
    assert!(rig.frames().is_empty());
}

#[test]
fn what_changes_about_a_guest_is_reported() {
    let mut rig = Rig::new();
    rig.syn((SERVER, 80));
    rig.wait(Duration::from_secs(2));
    let reports = rig.reports();
    let status = reports.iter().find_map(|r| {
        if let Report::VmStatus(s) = r {
            Some(s)
        } else {
            None
        }
    });
    let status = status.expect("a status");
    assert_eq!(status.mac, GUEST_MAC.to_string());
    assert_eq!(status.addresses, [std::net::IpAddr::V4(GUEST)]);
}

#[test]
fn no_frame_makes_the_engine_panic() {
    let mut rig = Rig::new();
    rig.connect((SERVER, 80));
    let seeds = [
        segment((SERVER, 80), 0x18, 1001, 1, b"hello"),
        udp((GATEWAY, 53), &[0; 30]),
        echo(GATEWAY, 1, b"x"),
        arp(1, GUEST_MAC, GUEST, GATEWAY),
    ];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for turn in 0..60_000u32 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let mut packet = seeds[(state % 4) as usize].clone();
        for _ in 0..(state >> 8) % 4 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (state >> 20) as usize % packet.len();
            packet[at] = (state >> 40) as u8;
        }
        packet.truncate(packet.len().saturating_sub((state >> 50) as usize % 8));
        let ether_type = if state % 4 == 3 { 0x0806 } else { 0x0800 };
        rig.frame(ether_type, &packet);
        if turn % 64 == 0 {
            rig.wait(Duration::from_millis(200));
            rig.events.clear();
            rig.frames();
        }
    }
    assert!(rig.engine.flow_count() <= 64);
}
