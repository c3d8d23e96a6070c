//! Budgets: what a guest may do under a grant is counted and ended here, whoever else may hear of it.

use std::time::Duration;

use vnet_proto::model::{Allowance, Budget, Match, Miss, Verdict, VerdictAction};

use super::kit::*;
use crate::engine::Event;
use crate::engine::budget::{METERS_MAX, Room};
use crate::message::{FlowEnd, Order, Report};

const WEB: (std::net::Ipv4Addr, u16) = (SERVER, 80);
const SSH: (std::net::Ipv4Addr, u16) = (SERVER, 22);

fn bytes(up: u64, down: u64) -> Budget {
    Budget {
        connections: 0,
        bytes_up: up,
        bytes_down: down,
    }
}

fn connections(connections: u64) -> Budget {
    Budget {
        connections,
        ..Budget::default()
    }
}

/// A verdict for every port of the destination, with so much left after so much.
fn budgeted(miss: &Miss, grant: &str, left: Budget, used: Budget) -> Verdict {
    let mut verdict = verdict(miss, VerdictAction::Allow);
    if let Match::Flow(found) = &mut verdict.found {
        found.ports = "*".parse().unwrap();
    }
    Verdict {
        budget: Some(Allowance { left, used }),
        grant: grant.to_owned(),
        ..verdict
    }
}

impl Rig {
    /// Opens a connection under a grant; its place.
    fn open_under(&mut self, peer: (std::net::Ipv4Addr, u16), left: Budget) -> usize {
        self.syn(peer);
        let miss = self.misses().remove(0);
        self.order(Order::Verdict(Box::new(budgeted(
            &miss,
            "g1",
            left,
            Budget::default(),
        ))));
        let (at, _) = self.dialled(peer);
        at
    }

    /// The place of the dial to a destination; it is connected.
    fn dialled(&mut self, peer: (std::net::Ipv4Addr, u16)) -> (usize, Vec<Report>) {
        let reports = self.reports();
        let (at, to) = self.only_dial();
        assert_eq!(to.port(), peer.1);
        self.engine.handle_dialled(self.now, at);
        self.service();
        self.sent();
        (at, reports)
    }

    fn pass(&mut self, at: usize, up: usize, down: usize) {
        self.engine.count_bytes(self.now, at, up, down);
    }
}

fn uses(reports: &[Report]) -> Vec<(&str, Budget)> {
    let uses = reports.iter().filter_map(|r| match r {
        Report::Uses { uses, .. } => Some(uses),
        _ => None,
    });
    uses.flatten()
        .map(|(grant, used)| (grant.as_str(), *used))
        .collect()
}

fn closed(reports: &[Report]) -> Vec<FlowEnd> {
    let closed = |r: &Report| match r {
        Report::FlowClosed { end, .. } => Some(*end),
        _ => None,
    };
    reports.iter().filter_map(closed).collect()
}

#[test]
fn bytes_that_are_used_up_end_every_flow_of_the_grant_and_open_no_other() {
    let mut rig = Rig::new();
    let web = rig.open_under(WEB, bytes(1000, 0));
    rig.syn(SSH);
    let (ssh, _) = rig.dialled(SSH);
    assert_eq!(
        rig.engine.room(web),
        Room {
            up: 1000,
            down: usize::MAX
        }
    );

    rig.pass(web, 600, 50_000);
    assert_eq!(rig.engine.room(ssh).up, 400, "one budget for both");
    rig.wait(Duration::from_millis(300));
    let reports = rig.reports();
    assert_eq!(closed(&reports), []);
    let (told, used) = (
        uses(&reports),
        Budget {
            connections: 2,
            ..bytes(600, 50_000)
        },
    );
    assert_eq!(told, [("g1", used)]);

    // No controlplane says anything: its own count is enough.
    rig.pass(ssh, 400, 0);
    assert_eq!(rig.engine.room(web), Room { up: 0, down: 0 });
    rig.wait(Duration::ZERO);
    let reports = rig.reports();
    assert_eq!(closed(&reports), [FlowEnd::GrantEnded; 2]);
    let told = reports.iter().position(|r| matches!(r, Report::Uses { .. }));
    let cut = reports
        .iter()
        .position(|r| matches!(r, Report::FlowClosed { .. }));
    assert!(told < cut, "the controlplane hears why");
    let resets = rig.sent().iter().filter(|p| p[20 + 13] & 0x04 != 0).count();
    assert_eq!(resets, 2, "the guest sees RST");

    // The verdict is still in the cache, and opens nothing.
    rig.syn((SERVER, 81));
    assert_eq!(rig.misses().len(), 1);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
}

#[test]
fn the_datagram_that_uses_a_budget_up_is_the_last() {
    let mut rig = Rig::new();
    rig.ip(&udp((SERVER, 53), b"one"));
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(budgeted(
        &miss,
        "g1",
        bytes(0, 100),
        Budget::default(),
    ))));
    let Some(Event::Send { flow: at, .. }) = rig.events.iter().find(|e| matches!(e, Event::Send { .. }))
    else {
        panic!("{:?}", rig.events)
    };
    let at = *at;
    for (length, lives) in [(99, true), (200, false)] {
        rig.engine.handle_datagram(rig.now, at, &vec![7; length]);
        assert_eq!(rig.only_datagram().1.len(), length);
        rig.wait(Duration::ZERO);
        assert_eq!(rig.engine.flow(at).is_some(), lives);
    }
}

#[test]
fn what_echo_carries_counts_against_a_grants_bytes_and_nothing_follows_the_last() {
    let mut rig = Rig::new();
    rig.ip(&echo(SERVER, 77, &[7; 60]));
    let miss = rig.misses().remove(0);
    rig.order(Order::Verdict(Box::new(Verdict {
        budget: Some(Allowance {
            left: bytes(100, 0),
            used: Budget::default(),
        }),
        grant: "g1".to_owned(),
        ..verdict(&miss, VerdictAction::Allow)
    })));
    // As the driver does it, that sends them.
    let sent = |rig: &mut Rig| {
        let (sent, others) = std::mem::take(&mut rig.events)
            .into_iter()
            .partition::<Vec<_>, _>(|e| matches!(e, Event::Send { .. }));
        rig.events = others;
        for event in &sent {
            if let Event::Send { flow, packets } = event {
                rig.pass(*flow, packets.iter().map(|p| p.len()).sum(), 0);
            }
        }
        sent.len()
    };
    assert_eq!(sent(&mut rig), 1);
    rig.ip(&echo(SERVER, 77, &[7; 60]));
    assert_eq!(sent(&mut rig), 1, "the message that uses it up is the last");
    rig.wait(Duration::ZERO);
    assert_eq!(rig.engine.flow_count(), 0);
    rig.ip(&echo(SERVER, 77, &[7; 60]));
    assert_eq!(sent(&mut rig), 0);
    assert_eq!(rig.misses().len(), 1, "it is asked about anew");
}

#[test]
fn a_verdict_with_limited_connections_is_for_one_flow_and_its_use_is_told_first() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    // Another flow to the same place waits for the same answer.
    let mut second = segment(WEB, 2, 5000, 0, &[]);
    second[20..22].copy_from_slice(&41_000_u16.to_be_bytes());
    rig.ip(&second);
    let miss = rig.misses().remove(0);
    let two = budgeted(&miss, "g1", connections(2), Budget::default());
    assert!(!two.once, "it need not say so");
    rig.order(Order::Verdict(Box::new(two)));
    let reports = rig.reports();
    let used = uses(&reports);
    assert_eq!(used, [("g1", connections(1))]);
    let told = reports.iter().position(|r| matches!(r, Report::Uses { .. }));
    let opened = reports.iter().position(|r| matches!(r, Report::FlowOpened(_)));
    assert!(told.is_some() && told < opened);
    let asked = reports.iter().filter(|r| matches!(r, Report::Miss(_))).count();
    assert_eq!(asked, 1, "the other asks anew");
    assert_eq!(rig.only_dial().1.port(), 80);
    rig.syn(SSH);
    assert_eq!(rig.misses().len(), 1, "nothing is cached");
}

#[test]
fn what_was_used_already_is_not_given_again_by_a_verdict_that_does_not_know() {
    let mut rig = Rig::new();
    let web = rig.open_under(WEB, bytes(1000, 0));
    rig.pass(web, 900, 0);
    // The controlplane had heard of 100 when it said that 900 were left; 100 are.
    rig.next_epoch();
    rig.reports();
    rig.syn(SSH);
    let miss = rig.misses().remove(0);
    let again = Verdict {
        epoch: EPOCH.next(),
        ..budgeted(&miss, "g1", bytes(900, 0), bytes(100, 0))
    };
    rig.order(Order::Verdict(Box::new(again)));
    let (ssh, _) = rig.dialled(SSH);
    assert_eq!((rig.engine.room(ssh).up, rig.engine.room(web).up), (100, 100));
}

#[test]
fn a_limit_that_others_draw_nearer_ends_flows_and_an_ended_grant_is_not_counted() {
    let mut rig = Rig::new();
    let web = rig.open_under(WEB, bytes(1000, 0));
    rig.pass(web, 300, 0);
    let limit = |limit| Order::Limit {
        grant: "g1".to_owned(),
        limit,
    };
    rig.order(limit(Some(bytes(800, 0))));
    assert_eq!(rig.engine.room(web).up, 500);
    rig.wait(Duration::from_secs(1));
    assert_eq!(closed(&rig.reports()), []);
    rig.order(limit(Some(bytes(300, 0))));
    rig.wait(Duration::ZERO);
    assert_eq!(closed(&rig.reports()), [FlowEnd::GrantEnded]);

    let mut rig = Rig::new();
    let web = rig.open_under(WEB, bytes(1000, 0));
    rig.order(limit(None));
    rig.pass(web, 5000, 0);
    rig.wait(Duration::from_secs(1));
    let reports = rig.reports();
    assert!(
        closed(&reports).is_empty() && uses(&reports).is_empty(),
        "whoever ended it judges the flow"
    );
    assert_eq!(rig.engine.room(web), Room::ANY);
}

#[test]
fn use_is_told_four_times_a_second_and_when_the_guest_goes_away() {
    let mut rig = Rig::new();
    let web = rig.open_under(WEB, bytes(1_000_000, 0));
    let mut told = 0;
    for _ in 0..100 {
        rig.pass(web, 10, 0);
        rig.wait(Duration::from_millis(10));
        told += uses(&rig.reports()).len();
    }
    assert!((3..=4).contains(&told), "{told}");
    rig.pass(web, 7, 0);
    rig.engine.handle_link_down();
    rig.wait(Duration::ZERO);
    let reports = rig.reports();
    assert_eq!(uses(&reports).last().unwrap().1.bytes_up, 1007);
}

#[test]
fn a_verdict_whose_budget_cannot_be_counted_is_not_acted_on() {
    let mut rig = Rig::new();
    for n in 0..=METERS_MAX {
        rig.syn((SERVER, 1000));
        let miss = rig.misses().remove(0);
        let grant = format!("g{n}");
        let once = Verdict {
            once: true,
            ..budgeted(&miss, &grant, bytes(1000, 0), Budget::default())
        };
        rig.order(Order::Verdict(Box::new(once)));
        let dialled = rig.events.iter().any(|e| matches!(e, Event::Dial { .. }));
        assert_eq!(dialled, n < METERS_MAX, "{n}");
        rig.events.clear();
        if dialled {
            // The guest gives up; the next SYN is a new flow.
            rig.tcp((SERVER, 1000), 4, 1001, 0, &[]);
            rig.events.clear();
        }
        rig.frames();
    }
    assert_eq!(rig.engine.budgets.refused, 1);
    rig.wait(HOLD);
    assert_eq!(rig.engine.flow_count(), 0, "it ends at its deadline");
}
