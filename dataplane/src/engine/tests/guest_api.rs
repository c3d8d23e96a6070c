//! The gateway's port 80.

use super::kit::*;
use crate::engine::frame::DropReason;
use crate::engine::guest_api::GUEST_API_FLOWS_MAX;
use crate::engine::stack::Phase;
use crate::engine::tcp::DialError;
use crate::engine::{Event, Time};
use crate::message::{Order, Report, Settings};

const API: (std::net::Ipv4Addr, u16) = (GATEWAY, 80);

fn offered() -> Rig {
    let mut rig = Rig::new();
    rig.engine.offer_guest_api();
    rig
}

/// What the driver is asked to open.
fn opened(rig: &mut Rig) -> Vec<usize> {
    let asked = rig.events.iter().filter_map(|event| match event {
        Event::OpenGuestApi { flow, guest } => {
            assert_eq!(*guest, std::net::IpAddr::from(GUEST));
            Some(*flow)
        }
        _ => None,
    });
    asked.collect()
}

fn syn_from(rig: &mut Rig, port: u16) {
    let mut packet = segment(API, 2, 1_000, 0, &[]);
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    rig.ip(&packet);
}

#[test]
fn it_is_closed_unless_it_is_offered() {
    let mut rig = Rig::new();
    rig.syn(API);
    assert_eq!(rig.only_segment().0 & 4, 4, "a reset");
    assert_eq!(rig.engine.dropped(DropReason::GatewayService), 1);
}

#[test]
fn a_connection_is_answered_once_there_is_a_way_and_the_session_hears_nothing_of_it() {
    let mut rig = offered();
    rig.syn(API);
    let [at] = opened(&mut rig)[..] else {
        panic!("one is asked for")
    };
    assert!(rig.sent().is_empty(), "not before");

    rig.engine.handle_dialled(rig.now, at);
    rig.service();
    let (flags, sequence, ..) = rig.only_segment();
    assert_eq!(flags & 0x12, 0x12, "SYN and ACK");
    rig.tcp(API, 0x10, 1_001, sequence.wrapping_add(1), &[]);
    rig.tcp(
        API,
        0x18,
        1_001,
        sequence.wrapping_add(1),
        b"GET / HTTP/1.1\r\n\r\n",
    );
    rig.service();
    let connection = rig.engine.connection(at).unwrap();
    assert_eq!(connection.phase(), Phase::Open);
    let mut heard = Vec::new();
    connection
        .lend_received(|bytes| {
            heard.extend_from_slice(bytes);
            Ok::<_, std::convert::Infallible>(bytes.len())
        })
        .unwrap();
    assert_eq!(heard, b"GET / HTTP/1.1\r\n\r\n");
    rig.engine.count_bytes(rig.now, at, heard.len(), 0);
    rig.wait(std::time::Duration::from_secs(2));
    rig.engine.handle_host_reset(rig.now, at);
    rig.wait(Time::from_secs(2));
    let told = rig.reports().into_iter().any(|report| {
        matches!(
            report,
            Report::FlowOpened(_) | Report::FlowClosed { .. } | Report::FlowStats(_) | Report::Miss { .. }
        )
    });
    assert!(!told);
}

#[test]
fn where_there_is_no_way_the_guest_sees_a_port_that_is_closed() {
    let mut rig = offered();
    rig.syn(API);
    let [at] = opened(&mut rig)[..] else {
        panic!("one is asked for")
    };
    rig.engine.handle_refused(rig.now, at, DialError::Refused);
    assert_eq!(rig.only_segment().0 & 4, 4, "a reset");
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn a_guest_has_so_many_at_once_and_one_more_when_one_has_ended() {
    let mut rig = offered();
    for port in 0..GUEST_API_FLOWS_MAX as u16 {
        syn_from(&mut rig, 40_000 + port);
    }
    assert_eq!(opened(&mut rig).len(), GUEST_API_FLOWS_MAX);
    assert!(rig.sent().is_empty());
    syn_from(&mut rig, 50_000);
    assert_eq!(rig.only_segment().0 & 4, 4, "a reset");
    assert_eq!(rig.engine.dropped(DropReason::FlowLimit), 1);
    assert_eq!(rig.engine.counters().get("guest_api_refused"), Some(&1));

    let first = opened(&mut rig)[0];
    rig.engine.handle_refused(rig.now, first, DialError::Refused);
    rig.sent();
    rig.events.clear();
    syn_from(&mut rig, 50_001);
    assert_eq!(opened(&mut rig).len(), 1);
}

#[test]
fn it_is_there_under_quarantine_and_only_on_port_80_of_the_ipv4_address() {
    let mut rig = offered();
    rig.order(Order::Settings(Settings {
        forwards_closed: true,
        ..settings()
    }));
    rig.syn(API);
    assert_eq!(opened(&mut rig).len(), 1);
    rig.syn((GATEWAY, 81));
    assert_eq!(rig.only_segment().0 & 4, 4, "a reset");
}
