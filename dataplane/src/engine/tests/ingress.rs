//! What comes in through forwards: as whom the guest sees it, what it gets in the way of, and its end.

use std::net::SocketAddr;
use std::time::Duration;

use vnet_proto::model::VerdictAction;

use super::kit::*;
use super::tcp::given_up;
use crate::engine::Event;
use crate::engine::ip::Ip;
use crate::engine::life::OPENING_PATIENCE;
use crate::message::{FlowEnd, ForwardId, Report};

const SSH: &str = "192.168.127.2:22";
/// The port that [`udp`] comes from.
const GUEST_UDP: &str = "192.168.127.2:50000";
/// The port that [`segment`] comes from.
const GUEST_TCP: &str = "192.168.127.2:40000";
const CLIENT: &str = "203.0.113.9:4000";
const SYN: u8 = 2;

fn place(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn cut(reports: &[Report]) -> usize {
    let cut = |r: &&Report| {
        matches!(
            r,
            Report::FlowClosed {
                end: FlowEnd::Cut,
                ..
            }
        )
    };
    reports.iter().filter(cut).count()
}

/// Whom a connection through a forward comes from, as the guest sees it.
fn seen(rig: &mut Rig, client: Option<&str>) -> String {
    let at = rig
        .engine
        .open_ingress(rig.now, None, place(SSH), client.map(place))
        .unwrap();
    rig.service();
    let sent = rig.sent();
    let ip = Ip::parse(&sent[0]).unwrap();
    let port = u16::from_be_bytes([ip.payload()[0], ip.payload()[1]]);
    let seen = SocketAddr::new(ip.source, port).to_string();
    rig.engine.handle_host_reset(rig.now, at);
    rig.service();
    rig.sent();
    seen
}

#[test]
fn a_forwards_connection_that_the_guest_does_not_answer_is_given_up() {
    let mut rig = Rig::new();
    let at = rig.engine.open_ingress(rig.now, None, place(SSH), None).unwrap();
    rig.service();
    rig.wait(OPENING_PATIENCE - Duration::from_millis(1));
    assert_eq!(rig.engine.flow_count(), 1);
    rig.wait(Duration::from_millis(1));
    assert!(given_up(&mut rig, at));
    assert_eq!(rig.engine.flow_count(), 0);
}

#[test]
fn forwards_that_are_closed_cut_what_came_through_them_and_count_it() {
    let mut rig = Rig::new();
    let (own, _) = rig.connect((SERVER, 80));
    let [one, other, datagrams] = [1, 2, 3].map(ForwardId);
    let through = [Some(one), Some(one), Some(other), None].map(|forward| {
        rig.engine
            .open_ingress(rig.now, forward, place(SSH), None)
            .unwrap()
    });
    let target = place("192.168.127.2:53");
    rig.engine
        .open_ingress_udp(rig.now, datagrams, target, None)
        .unwrap();
    rig.service();
    rig.reports();

    assert_eq!(rig.engine.close_forwards(rig.now, &[one]), 2);
    rig.service();
    assert_eq!(cut(&rig.reports()), 2);
    assert_eq!(rig.engine.close_forwards(rig.now, &[one]), 0, "once");
    assert_eq!(rig.engine.close_forwards(rig.now, &[other, datagrams]), 2);
    rig.service();
    assert_eq!(cut(&rig.reports()), 2);
    assert!(
        rig.engine.connection(own).is_some() && rig.engine.connection(through[3]).is_some(),
        "the guest's own and what came through no forward live on"
    );
}

#[test]
fn a_forward_opens_towards_the_guest_from_the_gateway() {
    let mut rig = Rig::new();
    let at = rig.engine.open_ingress(rig.now, None, place(SSH), None).unwrap();
    rig.service();
    let sent = rig.sent();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0][12..16], GATEWAY.octets());
    assert_eq!(sent[0][33] & 0x3f, SYN);
    assert!(
        rig.reports()
            .iter()
            .any(|r| matches!(r, Report::FlowOpened(o) if o.ingress))
    );
    assert!(rig.engine.connection(at).is_some());
    let outside = rig
        .engine
        .open_ingress(rig.now, None, place("203.0.113.9:22"), None);
    assert!(outside.is_none(), "a forward leads into the subnet only");
}

#[test]
fn a_client_is_seen_by_its_own_address_unless_that_means_somebody_else_to_the_guest() {
    let mut rig = Rig::new();
    assert_eq!(seen(&mut rig, Some(CLIENT)), CLIENT);
    assert_eq!(seen(&mut rig, Some("10.1.2.3:80")), "10.1.2.3:80", "private");
    let gateway = format!("{GATEWAY}:");
    for client in [
        None,
        Some("127.0.0.1:4000"),
        Some("127.8.8.8:4000"),
        // The host's own, the subnet's, the host alias, a synthetic address.
        Some("198.51.100.77:4000"),
        Some("192.168.127.3:4000"),
        Some("192.168.127.254:4000"),
        Some("198.18.0.5:4000"),
        // No client's.
        Some("0.0.0.0:4000"),
        Some("255.255.255.255:4000"),
        Some("224.0.0.1:4000"),
        Some("203.0.113.9:0"),
        // Of the other family.
        Some("[2001:db8::9]:4000"),
    ] {
        let seen = seen(&mut rig, client);
        assert!(seen.starts_with(&gateway), "{client:?} was seen as {seen}");
    }
    assert_eq!(rig.engine.counters().get("forward_client_refused"), None);
}

#[test]
fn what_a_guest_answers_to_a_clients_address_is_the_clients_and_is_not_asked_about() {
    let mut rig = Rig::new();
    let at = rig
        .engine
        .open_ingress(rig.now, None, place(GUEST_TCP), Some(place(CLIENT)))
        .unwrap();
    rig.service();
    let (flags, sequence, _, _) = rig.only_segment();
    assert_eq!(flags, SYN);
    let peer = (SERVER, 4000);
    rig.tcp(peer, 0x12, 5000, sequence.wrapping_add(1), &[]);
    rig.service();
    rig.tcp(peer, 0x18, 5001, sequence.wrapping_add(1), b"hello");
    let connection = rig.engine.connection(at).unwrap();
    let mut heard = Vec::new();
    connection
        .lend_received(|bytes| {
            heard.extend_from_slice(bytes);
            Ok::<_, std::io::Error>(bytes.len())
        })
        .unwrap();
    assert_eq!(heard, b"hello");
    rig.service();
    rig.sent();

    let forward = ForwardId(1);
    let at = rig
        .engine
        .open_ingress_udp(rig.now, forward, place(GUEST_UDP), Some(place(CLIENT)))
        .unwrap();
    rig.engine.handle_datagram(rig.now, at, b"ping");
    assert!(rig.only_datagram_from(SERVER, 4000, b"ping"));
    rig.ip(&udp(peer, b"pong"));
    let sent: Vec<_> = std::mem::take(&mut rig.events)
        .into_iter()
        .filter_map(|event| match event {
            Event::Send { flow, packets } => Some((flow, packets)),
            _ => None,
        })
        .collect();
    assert_eq!(sent, [(at, vec![b"pong".as_slice().into()])]);
    assert!(rig.misses().is_empty());

    // Another port of the client's is none of what came in.
    rig.ip(&udp((SERVER, 4001), b"out"));
    assert_eq!(rig.misses().len(), 1);
}

#[test]
fn a_client_that_the_guest_has_a_flow_with_is_refused_and_counted() {
    let mut rig = Rig::new();
    let udp_forward = ForwardId(1);
    let peer = (SERVER, 4000);
    // The guest's own: one that is open, one that still waits for its answer.
    rig.connect(peer);
    rig.ip(&udp(peer, b"mine"));
    let miss = rig.misses().remove(0);
    let flows = rig.engine.flow_count();
    let client = Some(place(CLIENT));
    let tcp = |rig: &mut Rig, client| rig.engine.open_ingress(rig.now, None, place(GUEST_TCP), client);
    let datagrams = |rig: &mut Rig, client| {
        let target = place(GUEST_UDP);
        rig.engine.open_ingress_udp(rig.now, udp_forward, target, client)
    };
    assert_eq!(tcp(&mut rig, client), None);
    assert_eq!(datagrams(&mut rig, client), None);
    assert_eq!(rig.engine.counters()["forward_client_refused"], 2);
    assert_eq!(rig.engine.flow_count(), flows);

    // What the guest has is as it was, and another port of the client's is served.
    rig.answer(&miss, VerdictAction::Allow);
    assert!(
        rig.events
            .iter()
            .any(|e| matches!(e, Event::Send { packets, .. } if packets[0][..] == *b"mine"))
    );
    assert!(tcp(&mut rig, Some(place("203.0.113.9:4001"))).is_some());
    assert!(datagrams(&mut rig, Some(place("203.0.113.9:4001"))).is_some());
    assert!(
        datagrams(&mut rig, None).is_some(),
        "as the gateway nothing is in the way"
    );
}

#[test]
fn a_guests_own_connection_from_a_clients_port_is_asked_about_and_ends_the_clients() {
    let mut rig = Rig::new();
    rig.engine
        .open_ingress(rig.now, None, place(GUEST_TCP), Some(place(CLIENT)))
        .unwrap();
    rig.service();
    let (_, sequence, _, _) = rig.only_segment();
    let peer = (SERVER, 4000);
    rig.tcp(peer, 0x12, 5000, sequence.wrapping_add(1), &[]);
    rig.service();
    rig.reports();

    rig.tcp(peer, SYN, 9000, 0, &[]);
    let reports = rig.reports();
    assert!(
        reports.iter().any(|r| matches!(
            r,
            Report::FlowClosed {
                end: FlowEnd::GuestReset,
                ..
            }
        )),
        "{reports:?}"
    );
    assert!(
        reports.iter().any(|r| matches!(r, Report::Miss(_))),
        "what it opens itself is its own: {reports:?}"
    );
}

impl Rig {
    /// Takes the only datagram sent; whether it is this one.
    fn only_datagram_from(&mut self, source: std::net::Ipv4Addr, port: u16, payload: &[u8]) -> bool {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{} packets were sent", sent.len());
        let ip = Ip::parse(&sent[0]).unwrap();
        ip.source == source && ip.payload()[..2] == port.to_be_bytes() && ip.payload()[8..] == *payload
    }
}

/// It is asked in words that any guest answers, also one that has sent nothing yet (RFC 826).
#[test]
fn a_guest_is_asked_for_an_address_that_may_be_its_own_and_for_no_other() {
    let mut rig = Rig::new();
    rig.engine.seek("192.168.127.7".parse().unwrap());
    let frames = rig.frames();
    let [frame] = &frames[..] else {
        panic!("{frames:?}")
    };
    assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &GATEWAY_MAC.0[..]));
    assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    assert_eq!(frame[22..28], GATEWAY_MAC.0);
    assert_eq!(frame[28..32], GATEWAY.octets());
    assert_eq!(frame[38..42], [192, 168, 127, 7]);
    // The network's own, the last, the gateway's, one that the gateway stands for, and elsewhere.
    for other in [
        "192.168.127.0",
        "192.168.127.255",
        "192.168.127.1",
        "192.168.127.254",
        "203.0.113.9",
    ] {
        rig.engine.seek(other.parse().unwrap());
        assert!(rig.frames().is_empty(), "{other}");
    }
    // The answer shows whose it is.
    let mut answer = vec![0, 1, 8, 0, 6, 4, 0, 2];
    answer.extend(GUEST_MAC.0);
    answer.extend([192, 168, 127, 7]);
    answer.extend(GATEWAY_MAC.0);
    answer.extend(GATEWAY.octets());
    rig.frame(0x0806, &answer);
    let at = rig
        .engine
        .open_ingress(rig.now, None, place("192.168.127.7:22"), None);
    assert!(at.is_some());
}
