//! Every way in which a flow ends that was never opened: nothing of it is left, and each thing is given back once.

use std::net::Ipv4Addr;
use std::time::Duration;

use vnet_proto::model::{CommandId, Miss, Verdict, VerdictAction};

use super::kit::*;
use crate::descriptors::{Descriptors, PER_GUEST, RESERVE_MIN};
use crate::engine::flow::FlowTable;
use crate::engine::frame::DropReason;
use crate::engine::tcp::DialError;
use crate::engine::{ECHO_FLOWS_MAX, Event, UDP_FLOWS_MAX};
use crate::message::{FlowEnd, Order, Report};

const WEB: (Ipv4Addr, u16) = (SERVER, 80);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// Descriptors that a guest alone can have now.
fn free(rig: &Rig) -> usize {
    std::iter::from_fn(|| rig.engine.config.descriptors.take().descriptor)
        .take(1_000)
        .collect::<Vec<_>>()
        .len()
}

fn allow_of_once(miss: &Miss) -> Order {
    Order::Verdict(Box::new(Verdict {
        once: true,
        ..verdict(miss, VerdictAction::Allow)
    }))
}

#[test]
fn whatever_ends_a_held_flow_leaves_nothing_of_it() {
    type End = fn(&mut Rig, &Miss);
    let ways: [(&str, End); 9] = [
        ("denied", |rig, miss| rig.answer(miss, VerdictAction::Deny)),
        ("dropped", |rig, miss| rig.answer(miss, VerdictAction::Drop)),
        ("denied once", |rig, miss| {
            rig.order(Order::Verdict(Box::new(Verdict {
                once: true,
                ..verdict(miss, VerdictAction::Deny)
            })));
        }),
        ("not decided", |rig, _| rig.wait(HOLD)),
        ("not decided in the time that a person had", |rig, miss| {
            rig.order(Order::Held {
                miss: miss.id,
                hold: Duration::from_secs(300),
            });
            rig.wait(Duration::from_secs(300));
        }),
        ("after the session was lost and came back", |rig, miss| {
            rig.order(Order::Revoke {
                command: None,
                epoch: EPOCH.next(),
            });
            rig.answer(miss, VerdictAction::Allow);
            rig.wait(HOLD);
        }),
        ("cut", |rig, _| {
            let flows = rig.engine.flows.places();
            let flows = flows.iter().map(|at| rig.engine.flow(*at).unwrap().id).collect();
            rig.order(Order::Cut {
                command: CommandId(1),
                flows,
            });
        }),
        ("the link is gone", |rig, _| {
            rig.engine.handle_link_down();
            rig.wait(Duration::ZERO);
        }),
        ("allowed once, dialled or sent, and over", |rig, miss| {
            rig.order(allow_of_once(miss));
            let dial = rig.events.iter().find_map(|e| match e {
                Event::Dial { flow, .. } => Some(*flow),
                _ => None,
            });
            match dial {
                Some(at) => rig.engine.handle_refused(rig.now, at, DialError::Refused),
                None => rig.wait(Duration::from_secs(200)),
            }
        }),
    ];
    let packets = [
        segment(WEB, 2, 1000, 0, &[]),
        udp(WEB, b"x"),
        echo(SERVER, 7, b"x"),
    ];
    for (way, end) in ways {
        for packet in &packets {
            let descriptors = Descriptors::new(RESERVE_MIN + PER_GUEST + 17);
            let mut rig = Rig::with_descriptors(&descriptors);
            let before = free(&rig);
            for round in 0..40 {
                rig.ip(packet);
                let miss = rig.misses().pop().unwrap_or_else(|| panic!("{way}: held"));
                end(&mut rig, &miss);
                rig.service();
                // What the driver does with a Close.
                rig.events.clear();
                rig.frames();
                assert_eq!(rig.engine.flow_count(), 0, "{way}, {round}");
                assert!(rig.engine.held.is_empty(), "{way}");
                assert_eq!(free(&rig), before, "{way}, {round}");
                // A yes or no that comes late, or twice, finds nobody.
                rig.order(allow_of_once(&miss));
                assert!(rig.events.is_empty(), "{way}: {:?}", rig.events);
                assert_eq!(rig.engine.flow_count(), 0, "{way}");
                rig.engine.cache.clear();
                if rig.engine.epoch() != Some(EPOCH) {
                    rig.order(Order::Revoke {
                        command: None,
                        epoch: EPOCH,
                    });
                }
                rig.order(Order::Lease {
                    epoch: EPOCH,
                    lease: Duration::from_secs(3_600),
                });
            }
            rig.wait(Duration::from_secs(400));
            assert_eq!(rig.engine.timers.len(), 0, "{way}: no timer is left");
        }
    }
}

#[test]
fn deadlines_of_flows_that_are_over_do_not_pile_up_for_as_long_as_packets_are_held() {
    let mut rig = Rig::new();
    rig.order(Order::Settings(crate::message::Settings {
        hold: Duration::from_secs(3_600),
        ..settings()
    }));
    for round in 0..50_000u32 {
        let [.., high, low] = round.to_be_bytes();
        rig.ip(&udp((Ipv4Addr::new(203, 0, high, low), 80), b"x"));
        let miss = rig.misses().remove(0);
        rig.order(Order::Verdict(Box::new(Verdict {
            once: true,
            ..verdict(&miss, VerdictAction::Deny)
        })));
        rig.frames();
        rig.events.clear();
        if round % 3 == 0 {
            rig.now += Duration::from_millis(1);
        }
    }
    assert!(rig.engine.timers.len() < 5_000, "{}", rig.engine.timers.len());
    // Those that count are kept: one that waits is refused in time.
    rig.ip(&udp(WEB, b"x"));
    rig.wait(Duration::from_secs(3_599));
    assert_eq!(rig.engine.flow_count(), 1);
    rig.wait(Duration::from_secs(1));
    assert_eq!(rig.engine.flow_count(), 0);
}

/// Sends a packet and lets it through; how many flows made way for its.
fn open(rig: &mut Rig, ether_type: u16, packet: &[u8]) -> usize {
    let mut evicted = 0;
    rig.frame(ether_type, packet);
    loop {
        let reports = rig.reports();
        if reports.is_empty() {
            break;
        }
        for report in reports {
            match report {
                Report::Miss(miss) => rig.answer(&miss, VerdictAction::Allow),
                Report::FlowClosed {
                    end: FlowEnd::Evicted,
                    ..
                } => evicted += 1,
                _ => {}
            }
        }
    }
    rig.frames();
    rig.events.clear();
    evicted
}

#[test]
fn beyond_the_limit_the_association_makes_way_that_was_idle_longest() {
    let mut rig = Rig::new();
    rig.engine.flows = FlowTable::new(2 * UDP_FLOWS_MAX);
    let all = u16::try_from(UDP_FLOWS_MAX).unwrap();
    for port in 1..=all {
        assert_eq!(open(&mut rig, 0x0800, &udp((ELSEWHERE, port), b"x")), 0);
        rig.now += Duration::from_millis(1);
    }
    // Those that came first, by their port.
    let place = |rig: &Rig, port: u16| {
        let peer = (ELSEWHERE, port).into();
        let mut places = rig.engine.flows.places().into_iter();
        places.find(|at| rig.engine.flow(*at).is_some_and(|flow| flow.key.peer == peer))
    };
    // The first has spoken since; the second is the one.
    let first = place(&rig, 1).unwrap();
    rig.engine.count_bytes(rig.now, first, 1, 0);
    for beyond in 1..=100 {
        assert_eq!(open(&mut rig, 0x0800, &udp((SERVER, beyond), b"x")), 1);
        assert_eq!(place(&rig, 1 + beyond), None);
        assert!(place(&rig, 2 + beyond).is_some());
        assert_eq!(rig.engine.flow_count(), UDP_FLOWS_MAX);
    }
    assert!(place(&rig, 1).is_some());
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 0);
}

#[test]
fn echo_of_both_families_has_one_limit() {
    let mut rig = Rig::dual();
    rig.engine.flows = FlowTable::new(2 * ECHO_FLOWS_MAX);
    let six = |identifier: u16| {
        let [high, low] = identifier.to_be_bytes();
        super::ipv6::packet(
            super::ipv6::GUEST6,
            "2001:db8::9",
            58,
            64,
            &[128, 0, 0, 0, high, low, 0, 1],
        )
    };
    for identifier in 0..ECHO_FLOWS_MAX as u16 {
        assert_eq!(open(&mut rig, 0x86dd, &six(identifier)), 0);
    }
    for identifier in 0..10 {
        assert_eq!(
            open(&mut rig, 0x0800, &echo(SERVER, identifier, b"x")),
            1,
            "{identifier}"
        );
        assert_eq!(rig.engine.flow_count(), ECHO_FLOWS_MAX);
    }
}
