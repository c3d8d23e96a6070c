//! What is refused, and who makes way, when the host's descriptors are few.

use std::time::Duration;

use vnet_proto::model::VerdictAction;

use super::kit::*;
use crate::descriptors::{Descriptors, PER_GUEST, RESERVE_MIN};
use crate::engine::Event;
use crate::engine::frame::DropReason;
use crate::engine::tcp::DialError;
use crate::message::{FlowEnd, Report};

/// Room for so many flows of a guest alone; one more is kept for another guest.
fn descriptors(flows: usize) -> Descriptors {
    Descriptors::new(RESERVE_MIN + PER_GUEST + flows + 1)
}

fn is_opened(report: &Report) -> bool {
    matches!(report, Report::FlowOpened(_))
}

#[test]
fn a_flow_for_which_no_descriptor_is_left_is_refused_and_counted() {
    let mut rig = Rig::with_descriptors(&descriptors(2));
    let (at, _) = rig.connect((SERVER, 1));
    rig.connect((SERVER, 2));
    rig.reports();

    // Held, and then let through: there is no room by now.
    rig.syn((SERVER, 3));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    assert_eq!(rig.only_segment().0, 0x14);
    // And by the cache.
    rig.syn((SERVER, 3));
    assert_eq!(rig.only_segment().0, 0x14);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    assert!(!rig.reports().iter().any(is_opened), "nothing opened");
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 2);

    // The same for datagrams.
    let datagram = udp((SERVER, 4), b"x");
    rig.ip(&datagram);
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    rig.frames();
    rig.ip(&datagram);
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Send { .. })));
    // And for a forward.
    let target = "192.168.127.2:22".parse().unwrap();
    assert!(rig.engine.open_ingress(rig.now, target).is_none());
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 4);
    assert_eq!(rig.engine.counters()["descriptors_refused"], 5);
    assert_eq!(rig.engine.flow_count(), 2);

    // One ends; there is room when its socket is closed, not before.
    rig.engine.handle_host_reset(rig.now, at);
    rig.frames();
    rig.syn((SERVER, 3));
    assert!(!rig.events.iter().any(|e| matches!(e, Event::Dial { .. })));
    rig.events.clear();
    rig.syn((SERVER, 3));
    rig.only_dial();
}

#[test]
fn a_guest_that_makes_way_gives_up_what_was_idle_longest() {
    let mut rig = Rig::new();
    let first = rig.connect((SERVER, 1)).0;
    rig.wait(Duration::from_secs(1));
    let second = rig.connect((SERVER, 2)).0;
    rig.wait(Duration::from_secs(1));
    let third = rig.connect((SERVER, 3)).0;
    rig.engine.count_bytes(rig.now, first, 1, 0);
    rig.reports();

    rig.engine.make_way(rig.now, 1);
    rig.service();

    assert_eq!(rig.only_segment().0 & 4, 4, "the guest is told");
    let closed =
        |e: &Event| matches!(e, Event::Close { flow, reset: true, descriptor: Some(_) } if *flow == second);
    assert!(rig.events.iter().any(closed));
    let evicted = |r: &Report| {
        matches!(
            r,
            Report::FlowClosed {
                end: FlowEnd::Evicted,
                ..
            }
        )
    };
    assert!(rig.reports().iter().any(evicted));
    assert!(rig.engine.flow(first).is_some() && rig.engine.flow(third).is_some());
    // More than there are is all.
    rig.engine.make_way(rig.now, 100);
    assert_eq!(rig.engine.flow_count(), 0);
    assert_eq!(rig.engine.counters()["flows_made_way"], 3);
}

#[test]
fn a_guest_below_its_share_is_served_while_another_makes_way() {
    let shared = Descriptors::new(RESERVE_MIN + 2 * PER_GUEST + 32);
    let hog = shared.attach(vnet_proto::model::VmId(9)).unwrap();
    let held: Vec<_> = std::iter::from_fn(|| hog.take().descriptor).collect();
    let mut rig = Rig::with_descriptors(&shared);
    rig.syn((SERVER, 1));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let asked = |e: &Event| matches!(e, Event::MakeWay { vm, count } if vm.0 == 9 && *count > 0);
    assert!(
        rig.events.iter().any(asked),
        "{} taken, {:?}",
        held.len(),
        rig.events
    );
    rig.only_dial();
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 0);
}

#[test]
fn a_dial_that_the_host_itself_refuses_is_counted() {
    let mut rig = Rig::new();
    rig.syn((SERVER, 80));
    let miss = rig.misses().remove(0);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_refused(rig.now, at, DialError::Local);
    assert_eq!(rig.only_icmp(), (3, 1));
    assert_eq!(rig.engine.counters()["dials_failed"], 1);
}
