//! A guest whose link is gone and comes back: what waits for it, and what does not.

use std::time::Duration;

use vnet_proto::model::VerdictAction;

use super::kit::{GUEST_MAC, Rig, SERVER, ended, udp};
use crate::engine::transmit::Framing;
use crate::message::{MissEnd, Report};

const WEB: (std::net::Ipv4Addr, u16) = (SERVER, 80);

fn is_attached(rig: &mut Rig) -> Vec<bool> {
    rig.reports()
        .iter()
        .filter_map(|report| match report {
            Report::VmStatus(status) => Some(status.attached),
            _ => None,
        })
        .collect()
}

fn back(rig: &mut Rig, at: usize) {
    rig.engine.handle_link_back(Framing::Be32);
    rig.engine.finish_service(rig.now, at);
}

#[test]
fn what_was_lost_on_the_way_is_sent_again_as_soon_as_there_is_a_link() {
    let mut rig = Rig::new();
    let (at, sequence) = rig.connect(WEB);
    let fill = |room: &mut [u8]| {
        room[..5].copy_from_slice(b"hello");
        Ok::<_, ()>(5)
    };
    rig.engine.connection(at).unwrap().lend_room(fill).unwrap();
    rig.engine.finish_service(rig.now, at);
    assert_eq!(rig.only_segment().3, b"hello");

    rig.engine.handle_link_lost();
    // Ten seconds in which nothing can be sent cost no more than a look now and then.
    let (until, mut turns) = (rig.now + Duration::from_secs(10), 0);
    while let Some(due) = rig.engine.poll_timeout().filter(|due| *due < until) {
        rig.now = rig.now.max(due);
        rig.engine.handle_timeout(rig.now);
        rig.service();
        turns += 1;
    }
    assert!((10..200).contains(&turns), "{turns}");
    assert!(rig.frames().is_empty());
    back(&mut rig, at);
    let (_, again, _, payload) = rig.only_segment();
    assert_eq!((again, payload.as_slice()), (sequence, &b"hello"[..]));
    rig.tcp(WEB, 0x10, 1001, sequence + 5, &[]);
    rig.wait(Duration::from_secs(60));
    assert!(rig.frames().is_empty(), "it was acknowledged");
}

#[test]
fn the_session_is_told_at_once_that_the_link_is_gone_and_that_it_is_back() {
    let mut rig = Rig::new();
    assert_eq!(rig.engine.spoken_mac(), None);
    rig.ip(&udp(WEB, b"x"));
    assert_eq!(rig.engine.spoken_mac(), Some(GUEST_MAC));
    rig.wait(Duration::from_secs(2));
    rig.reports();
    rig.engine.handle_link_lost();
    rig.service();
    assert_eq!(is_attached(&mut rig), [false]);
    rig.engine.handle_link_back(Framing::Le16);
    rig.service();
    assert_eq!(is_attached(&mut rig), [true]);
    assert_eq!(rig.engine.transmit.frame_bytes_max(), 0xffff);
}

#[test]
fn a_pinned_guest_has_not_spoken_before_it_does() {
    let mut rig = Rig::pinned(GUEST_MAC);
    assert_eq!(rig.engine.spoken_mac(), None);
    rig.ip(&udp(WEB, b"x"));
    assert_eq!(rig.engine.spoken_mac(), Some(GUEST_MAC));
}

#[test]
fn who_cannot_repeat_a_syn_has_not_given_up_and_a_yes_meanwhile_serves_it() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.wait(Duration::from_secs(1));
    rig.syn(WEB);
    rig.engine.handle_link_lost();
    rig.wait(Duration::from_secs(10));
    assert_eq!(ended(&rig.reports()), []);
    rig.answer(&miss, VerdictAction::Allow);
    let (at, _) = rig.only_dial();
    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    assert!(rig.frames().is_empty());
    back(&mut rig, at);
    assert_eq!(rig.only_segment().0, 0x12);
}

#[test]
fn nobody_waits_beyond_the_deadline_of_a_question() {
    let mut rig = Rig::new();
    rig.syn(WEB);
    let miss = rig.misses().remove(0);
    rig.engine.handle_link_lost();
    rig.wait(Duration::from_secs(30));
    assert_eq!(ended(&rig.reports()), [(miss.id, MissEnd::HoldExpired)]);
    assert_eq!(rig.engine.flow_count(), 0);
}
