//! What a guest's lookups teach, as its connections meet it: at once, for a time, and from nobody else.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use vnet_proto::model::{FlowSubject, Guard, Match, Miss, Subject, Verdict, VerdictAction};

use super::kit::*;
use crate::engine::Event;
use crate::engine::tcp::DialError;
use crate::message::{Order, Report};

const SECOND: Duration = Duration::from_secs(1);

/// A question for the A records of a name.
fn question(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
    bytes
}

/// Its answer.
fn answered(id: u16, name: &str, addresses: &[Ipv4Addr], ttl: u32) -> Vec<u8> {
    let mut bytes = question(id, name);
    bytes[2..4].copy_from_slice(&[0x81, 0x80]);
    bytes[7] = addresses.len() as u8;
    for address in addresses {
        bytes.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        bytes.extend_from_slice(&ttl.to_be_bytes());
        bytes.extend_from_slice(&[0, 4]);
        bytes.extend_from_slice(&address.octets());
    }
    bytes
}

/// A guest all of whose lookups are allowed.
struct Asker {
    rig: Rig,
    port: u16,
}

impl Asker {
    fn new() -> Self {
        Self {
            rig: Rig::new(),
            port: 1024,
        }
    }

    /// The guest looks a name up, and the answer is on its way to it.
    fn look_up(&mut self, name: &str, addresses: &[Ipv4Addr], ttl: u32) {
        self.rig.ip(&udp((GATEWAY, 53), &question(7, name)));
        if let Some(miss) = self.rig.misses().pop() {
            self.rig.order(Order::Verdict(Box::new(every_lookup(&miss))));
        }
        let asked = self.rig.events.iter().find_map(|e| match e {
            Event::Resolve { query, .. } => Some(*query),
            _ => None,
        });
        self.rig.events.clear();
        let bytes = answered(0, name, addresses, ttl);
        self.rig
            .engine
            .handle_resolved(self.rig.now, asked.unwrap(), Some(bytes));
        self.rig.service();
    }

    /// The guest opens a connection, from a port of its own; what is asked about it.
    fn open(&mut self, to: Ipv4Addr) -> Option<Miss> {
        let mut syn = segment((to, 443), 2, 1000, 0, &[]);
        self.port = self.port.checked_add(1).unwrap_or(1024);
        syn[20..22].copy_from_slice(&self.port.to_be_bytes());
        self.rig.sent();
        self.rig.ip(&syn);
        self.rig.misses().pop()
    }

    /// It is dialled, and the host's side refuses, which makes room for the next.
    fn is_dialled_to(&mut self, to: Ipv4Addr) {
        let (at, dialled) = self.rig.only_dial();
        assert_eq!(dialled.ip(), IpAddr::V4(to));
        self.rig
            .engine
            .handle_refused(self.rig.now, at, DialError::Refused);
        self.rig.service();
        self.rig.events.clear();
    }
}

/// What a controlplane says to a destination that it allows for its name alone.
fn allowed_by_name(miss: &Miss, name: &str) -> Verdict {
    let named = subject(miss).names.iter().any(|n| n.as_str() == name);
    let action = if named {
        VerdictAction::Allow
    } else {
        VerdictAction::Deny
    };
    let mut verdict = verdict(miss, action);
    if let Match::Flow(found) = &mut verdict.found {
        found.names_consulted = true;
    }
    verdict
}

fn subject(miss: &Miss) -> &FlowSubject {
    let Subject::Flow(flow) = &miss.subject else {
        panic!("not a flow")
    };
    flow
}

fn names(miss: &Miss) -> Vec<&str> {
    subject(miss).names.iter().map(|n| n.as_str()).collect()
}

#[test]
fn ten_thousand_connections_to_addresses_that_rotate_are_never_refused() {
    let mut asker = Asker::new();
    let all: Vec<Ipv4Addr> = (1..=64).map(|n| Ipv4Addr::new(203, 0, 113, n)).collect();
    let (mut opened, mut asked) = (0, 0);
    for turn in 0.. {
        let eight: Vec<Ipv4Addr> = (0..8).map(|n| all[(turn * 8 + n) % all.len()]).collect();
        // Their time is over long before they are told again.
        asker.look_up("cdn.test", &eight, 1);
        for to in eight {
            if let Some(miss) = asker.open(to) {
                asked += 1;
                let verdict = allowed_by_name(&miss, "cdn.test");
                asker.rig.order(Order::Verdict(Box::new(verdict)));
            }
            asker.is_dialled_to(to);
            opened += 1;
        }
        if opened >= 10_000 {
            break;
        }
        asker.rig.wait(SECOND);
    }
    assert_eq!(asked, all.len(), "one question for each address");
}

#[test]
fn a_connection_in_the_moment_of_the_answer_is_known_by_its_name() {
    let mut asker = Asker::new();
    for n in 0..20_000u32 {
        let to = Ipv4Addr::from(0x0100_0000 + n);
        let name = format!("n{n}.test");
        // No time passes between the answer and the SYN.
        asker.look_up(&name, &[to], 60);
        let miss = asker.open(to).unwrap();
        assert_eq!(names(&miss), [&name]);
        asker.rig.answer(&miss, VerdictAction::Allow);
        asker.is_dialled_to(to);
    }
}

#[test]
fn the_controlplane_hears_of_a_name_before_it_is_asked_about_its_address() {
    let mut asker = Asker::new();
    asker.look_up("a.test", &[SERVER], 60);
    let at = asker.rig.events.iter().position(is_binding);
    let mut syn = segment((SERVER, 443), 2, 1000, 0, &[]);
    syn[20..22].copy_from_slice(&[9, 9]);
    asker.rig.ip(&syn);
    let miss = |e: &Event| matches!(e, Event::Report(r) if matches!(**r, Report::Miss(_)));
    let asked = asker.rig.events.iter().position(miss);
    assert!(at.is_some() && at < asked, "{at:?} {asked:?}");
}

fn is_binding(event: &Event) -> bool {
    matches!(event, Event::Report(r) if matches!(**r, Report::Binding { .. }))
}

#[test]
fn nothing_that_a_guest_sends_as_an_answer_teaches_anything() {
    let mut asker = Asker::new();
    // A question of its own is under way.
    asker.rig.ip(&udp((GATEWAY, 53), &question(7, "allowed.test")));
    let miss = asker.rig.misses().remove(0);
    asker.rig.order(Order::Verdict(Box::new(every_lookup(&miss))));
    let forged = answered(7, "allowed.test", &[SERVER], 60);
    for source in [GUEST, GATEWAY, SERVER] {
        for to in [GUEST, GATEWAY, ALIAS] {
            for (from_port, to_port) in [(53u16, 50_000), (53, 53), (50_000, 53), (5353, 5353)] {
                let mut packet = udp((to, to_port), &forged);
                packet[12..16].copy_from_slice(&source.octets());
                packet[20..22].copy_from_slice(&from_port.to_be_bytes());
                asker.rig.ip(&packet);
            }
        }
    }
    assert!(!asker.rig.events.iter().any(is_binding));
    let miss = asker.open(SERVER).unwrap();
    assert_eq!(names(&miss), [""; 0]);
}

#[test]
fn after_its_time_a_name_says_nothing_of_a_new_connection_and_the_old_one_lives() {
    let mut asker = Asker::new();
    asker.look_up("a.test", &[SERVER], 100);
    let miss = asker.open(SERVER).unwrap();
    asker
        .rig
        .order(Order::Verdict(Box::new(allowed_by_name(&miss, "a.test"))));
    let (at, _) = asker.rig.only_dial();
    asker.rig.engine.handle_dialled(asker.rig.now, at);
    asker.rig.service();
    let (_, sequence, ..) = asker.rig.only_segment();
    let mut ack = segment((SERVER, 443), 0x10, 1001, sequence + 1, &[]);
    ack[20..22].copy_from_slice(&asker.port.to_be_bytes());
    asker.rig.ip(&ack);
    // 100 s and 30 s more.
    asker.rig.wait(129 * SECOND);
    assert!(asker.open(SERVER).is_none(), "what was decided still stands");
    let (second, _) = asker.rig.only_dial();
    asker
        .rig
        .engine
        .handle_refused(asker.rig.now, second, DialError::Refused);
    asker.rig.wait(SECOND);
    let miss = asker.open(SERVER).unwrap();
    assert_eq!(names(&miss), [""; 0], "asked anew, and known by no name");
    asker
        .rig
        .order(Order::Verdict(Box::new(allowed_by_name(&miss, "a.test"))));
    assert!(!asker.rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert!(asker.rig.engine.flow(at).is_some());
}

#[test]
fn an_answer_that_leads_inwards_is_told_as_such_and_never_dialled_unasked() {
    for text in [
        "10.0.0.5",
        "172.16.0.5",
        "192.168.0.5",
        "100.64.0.1",
        "169.254.169.254",
        "198.18.0.1",
    ] {
        let to: Ipv4Addr = text.parse().unwrap();
        let mut asker = Asker::new();
        asker.look_up("rebound.test", &[to], 60);
        let miss = asker.open(to).unwrap();
        assert_eq!(names(&miss), ["rebound.test"], "{text}");
        assert!(subject(&miss).guards.contains(Guard::PrivateFromDns), "{text}");
    }
    for to in [
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::new(224, 0, 0, 251),
        Ipv4Addr::BROADCAST,
    ] {
        let mut asker = Asker::new();
        asker.look_up("rebound.test", &[to], 60);
        assert!(asker.open(to).is_none(), "{to}");
        assert!(asker.rig.events.iter().all(|e| !matches!(e, Event::Dial { .. })));
    }
    let mut asker = Asker::new();
    asker.look_up("rebound.test", &[ALIAS], 60);
    let miss = asker.open(ALIAS).unwrap();
    assert!(subject(&miss).guards.contains(Guard::Host));
}
