//! The DNS server under driven time: what a guest asks, what is asked for it, what it is told.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as WireQuery};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{Name as WireName, RData, Record, RecordType};

use std::net::Ipv4Addr;

use super::*;

const HOLD: Duration = Duration::from_secs(4);
const NOW: Time = Duration::from_secs(100);

struct Guest {
    dns: Dns,
    zones: Zones,
    now: Time,
}

impl Guest {
    fn new() -> Self {
        let zones = zones::default_zones([192, 168, 127, 1].into(), Some([192, 168, 127, 254].into()));
        Self {
            dns: Dns::new(HOLD, [7; 32]),
            zones,
            now: NOW,
        }
    }

    fn ask(&mut self, id: u16, name: &str, kind: RecordType) {
        self.dns.handle_query(
            self.now,
            &self.zones,
            client(),
            Transport::Udp,
            &query(id, name, kind, true),
        );
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.dns.poll_event()).collect()
    }

    fn verdict(&mut self, name: &str, action: VerdictAction) {
        let reason = Reason::new("rule", "rules[3]", "no lookups of tests");
        self.dns
            .handle_name_verdict(self.now, &name.parse().unwrap(), action, &reason, 0);
    }

    /// Asks, allows, and returns the number that the question goes upstream under.
    fn send_upstream(&mut self, id: u16, name: &str, kind: RecordType) -> u64 {
        self.ask(id, name, kind);
        self.verdict(name, VerdictAction::Allow);
        let sent = self.events().into_iter().find_map(|e| match e {
            Event::Upstream { query, .. } => Some(query),
            _ => None,
        });
        sent.unwrap()
    }
}

fn client() -> SocketAddr {
    "192.168.127.2:5353".parse().unwrap()
}

fn wire(name: &str) -> WireName {
    WireName::from_ascii(name).unwrap()
}

fn query(id: u16, name: &str, kind: RecordType, edns: bool) -> Vec<u8> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(WireQuery::query(wire(name), kind));
    if edns {
        message.set_edns(Edns::new());
    }
    message.to_vec().unwrap()
}

fn answer(name: &str, kind: RecordType, records: &[(RData, u32)]) -> Vec<u8> {
    let mut message = Message::response(0, OpCode::Query);
    message.add_query(WireQuery::query(wire(name), kind));
    message.add_answers(
        records
            .iter()
            .map(|(data, ttl)| Record::from_rdata(wire(name), *ttl, data.clone())),
    );
    message.to_vec().unwrap()
}

fn replies(events: &[Event]) -> Vec<Message> {
    let of = |e: &Event| match e {
        Event::Reply {
            bytes,
            transport: Transport::Udp,
            ..
        } => Some(Message::from_vec(bytes).unwrap()),
        Event::Reply { bytes, .. } => Some(Message::from_vec(&bytes[2..]).unwrap()),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

fn extended_error(message: &Message) -> (u16, String) {
    match message.edns.as_ref().unwrap().options().get(15.into()) {
        Some(EdnsOption::Unknown(_, data)) => (
            u16::from_be_bytes([data[0], data[1]]),
            String::from_utf8(data[2..].to_vec()).unwrap(),
        ),
        other => panic!("{other:?}"),
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn local_names_need_no_verdict() {
    let mut guest = Guest::new();
    guest.ask(1, "Host.Containers.Internal.", RecordType::A);
    let events = guest.events();
    assert_eq!(replies(&events)[0].answers.len(), 1);
    assert_eq!(events.len(), 1, "nothing is asked, nothing bound");
}

#[test]
fn a_name_is_asked_for_once_and_all_its_queries_go_on() {
    let mut guest = Guest::new();
    guest.ask(1, "a.test.", RecordType::A);
    guest.ask(2, "A.test.", RecordType::AAAA);
    guest.ask(1, "a.test.", RecordType::A);
    assert_eq!(
        guest.events(),
        [Event::Ask {
            name: name("a.test"),
            query_type: 1
        }]
    );
    assert_eq!(
        (guest.dns.held_for(&name("a.test")), guest.dns.counts().repeated),
        (2, 1)
    );

    guest.verdict("a.test", VerdictAction::Allow);
    let events = guest.events();
    assert!(
        matches!(
            &events[0],
            Event::Decided {
                action: VerdictAction::Allow,
                count: 2,
                ..
            }
        ),
        "{events:?}"
    );
    let asked = events
        .iter()
        .filter(|e| matches!(e, Event::Upstream { .. }))
        .count();
    assert_eq!((asked, guest.dns.held_for(&name("a.test"))), (2, 0));

    guest.ask(1, "a.test.", RecordType::A);
    assert_eq!(guest.events(), [], "a repetition of one that is under way");
}

#[test]
fn addresses_are_bound_before_the_guest_learns_them() {
    let mut guest = Guest::new();
    let query = guest.send_upstream(7, "a.test.", RecordType::A);
    let data = RData::A("203.0.113.5".parse().unwrap());
    guest
        .dns
        .handle_upstream(query, Some(&answer("a.test.", RecordType::A, &[(data, 300)])));
    let events = guest.events();
    let bound = Event::Bind {
        name: name("a.test"),
        addresses: vec!["203.0.113.5".parse().unwrap()],
        expires_in: Duration::from_secs(330),
    };
    assert_eq!(events[0], bound);
    let reply = &replies(&events[1..])[0];
    assert_eq!((reply.metadata.id, reply.answers.len()), (7, 1));
    guest.dns.handle_upstream(query, None);
    assert_eq!(guest.events(), [], "answered already");
}

#[test]
fn the_time_of_a_binding_has_bounds_and_other_types_bind_nothing() {
    for (ttl, expected) in [(0, 60), (100, 130), (1_000_000, 3_630)] {
        let mut guest = Guest::new();
        let query = guest.send_upstream(7, "a.test.", RecordType::AAAA);
        let data = RData::AAAA("2001:db8::5".parse().unwrap());
        guest
            .dns
            .handle_upstream(query, Some(&answer("a.test.", RecordType::AAAA, &[(data, ttl)])));
        let Event::Bind { expires_in, .. } = guest.events()[0] else {
            panic!("no binding")
        };
        assert_eq!(expires_in.as_secs(), expected);
    }
    let mut guest = Guest::new();
    let query = guest.send_upstream(7, "a.test.", RecordType::ANY);
    let data = RData::A("203.0.113.5".parse().unwrap());
    guest
        .dns
        .handle_upstream(query, Some(&answer("a.test.", RecordType::ANY, &[(data, 300)])));
    assert!(matches!(guest.events()[..], [Event::Reply { .. }]));
}

#[test]
fn denied_is_refused_with_the_reason_and_dropped_is_silence() {
    let mut guest = Guest::new();
    guest.ask(1, "a.test.", RecordType::A);
    guest.verdict("a.test", VerdictAction::Deny);
    let reply = &replies(&guest.events())[0];
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    assert_eq!(extended_error(reply), (15, "no lookups of tests".to_owned()));

    guest.ask(2, "a.test.", RecordType::A);
    let person = Reason::new("grant", "g-1", "denied by anna");
    guest
        .dns
        .handle_name_verdict(NOW, &name("a.test"), VerdictAction::Deny, &person, 0);
    assert_eq!(
        extended_error(&replies(&guest.events())[0]),
        (17, "denied by anna".to_owned())
    );

    guest.ask(3, "a.test.", RecordType::A);
    guest.verdict("a.test", VerdictAction::Drop);
    assert!(replies(&guest.events()).is_empty());
    assert_eq!(guest.dns.poll_timeout(), None);
}

#[test]
fn an_undecided_name_is_held_then_answered_that_it_awaits_approval() {
    let mut guest = Guest::new();
    guest.ask(1, "a.test.", RecordType::A);
    guest.now += Duration::from_secs(1);
    guest.ask(2, "a.test.", RecordType::AAAA);
    guest.events();
    assert_eq!(guest.dns.poll_timeout(), Some(NOW + HOLD));
    guest.dns.handle_timeout(NOW + HOLD - Duration::from_millis(1));
    assert_eq!(guest.events(), [], "too early is harmless");
    guest.dns.handle_timeout(NOW + HOLD);
    let events = guest.events();
    let reply = &replies(&events)[0];
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(
        extended_error(reply),
        (
            0,
            "a.test awaits approval; ask again once it is approved".to_owned()
        )
    );
    assert_eq!(events.len(), 1, "the other one still waits");
    guest.dns.handle_timeout(NOW + HOLD + Duration::from_secs(1));
    let unasked = Event::Unasked {
        name: name("a.test"),
        why: Unasked::HoldEnded,
    };
    assert_eq!(guest.events().last(), Some(&unasked));
    assert_eq!(guest.dns.counts().hold_ended, 2);

    guest.ask(1, "a.test.", RecordType::A);
    assert!(matches!(guest.events()[..], [Event::Ask { .. }]), "asked anew");
}

#[test]
fn a_longer_hold_holds_longer() {
    let mut guest = Guest::new();
    guest.ask(1, "a.test.", RecordType::A);
    guest
        .dns
        .handle_held(NOW, &name("a.test"), Duration::from_secs(30));
    assert_eq!(guest.dns.poll_timeout(), Some(NOW + Duration::from_secs(30)));
}

#[test]
fn no_upstream_answer_is_servfail() {
    let mut guest = Guest::new();
    let query = guest.send_upstream(1, "a.test.", RecordType::A);
    guest.dns.handle_upstream(query, None);
    assert_eq!(
        replies(&guest.events())[0].metadata.response_code,
        ResponseCode::ServFail
    );

    let query = guest.send_upstream(2, "a.test.", RecordType::A);
    guest
        .dns
        .handle_upstream(query, Some(&answer("b.test.", RecordType::A, &[])));
    assert_eq!(
        extended_error(&replies(&guest.events())[0]).0,
        ExtendedError::NETWORK_ERROR
    );

    guest.send_upstream(3, "a.test.", RecordType::A);
    guest.dns.handle_timeout(NOW + UPSTREAM_TIME);
    assert_eq!(replies(&guest.events())[0].metadata.id, 3);
    assert_eq!(
        (guest.dns.poll_timeout(), guest.dns.counts().upstream_failed),
        (None, 3)
    );
}

#[test]
fn held_queries_are_bounded_and_decided_names_find_room() {
    let mut guest = Guest::new();
    for n in 0..HELD_MAX {
        guest.ask(1, &format!("n{n}.test."), RecordType::A);
    }
    assert_eq!(guest.events().len(), HELD_MAX);
    // One whose verdict is at hand passes.
    guest.ask(2, "allowed.test.", RecordType::A);
    assert!(matches!(guest.dns.poll_event(), Some(Event::Ask { .. })));
    guest.verdict("allowed.test", VerdictAction::Allow);
    assert!(matches!(
        guest.events()[..],
        [Event::Decided { .. }, Event::Upstream { .. }]
    ));
    // One more that waits does not.
    guest.ask(3, "more.test.", RecordType::A);
    let events = guest.events();
    assert!(matches!(
        &events[..],
        [
            Event::Ask { .. },
            Event::Reply { .. },
            Event::Unasked {
                why: Unasked::NoRoom,
                ..
            }
        ]
    ));
    assert_eq!(replies(&events)[0].metadata.response_code, ResponseCode::ServFail);
    assert_eq!(guest.dns.counts().held_full, 1);
}

#[test]
fn a_caller_without_room_refuses_the_name() {
    let mut guest = Guest::new();
    guest.ask(1, "a.test.", RecordType::A);
    guest.events();
    guest.dns.handle_no_room(&name("a.test"));
    assert_eq!(
        replies(&guest.events())[0].metadata.response_code,
        ResponseCode::ServFail
    );
    assert_eq!(guest.dns.poll_timeout(), None);
}

#[test]
fn upstream_queries_are_bounded() {
    let mut guest = Guest::new();
    for n in 0..UPSTREAM_MAX {
        guest.send_upstream(1, &format!("n{n}.test."), RecordType::A);
    }
    guest.ask(9, "more.test.", RecordType::A);
    guest.verdict("more.test", VerdictAction::Allow);
    let events = guest.events();
    assert_eq!(replies(&events)[0].metadata.response_code, ResponseCode::ServFail);
    assert_eq!(guest.dns.counts().upstream_full, 1);
}

#[test]
fn a_connection_carries_many_queries_and_long_answers() {
    let mut guest = Guest::new();
    let stream: Vec<u8> = [
        query(1, "a.test.", RecordType::TXT, false),
        query(2, "b.test.", RecordType::TXT, false),
    ]
    .iter()
    .flat_map(|q| framed(q).unwrap())
    .collect();
    let (zones, now) = (guest.zones.clone(), guest.now);
    for piece in stream.chunks(3) {
        assert_eq!(
            guest.dns.handle_stream(now, &zones, client(), 5, piece),
            Some(piece.len())
        );
    }
    assert_eq!(guest.events().len(), 2);
    guest.verdict("b.test", VerdictAction::Allow);
    let Event::Upstream { query, .. } = guest.events()[1] else {
        panic!("not asked")
    };
    let text = RData::TXT(hickory_proto::rr::rdata::TXT::new(vec!["x".repeat(250); 10]));
    guest
        .dns
        .handle_upstream(query, Some(&answer("b.test.", RecordType::TXT, &[(text, 60)])));
    let events = guest.events();
    assert!(matches!(
        events[0],
        Event::Reply {
            transport: Transport::Tcp(5),
            ..
        }
    ));
    let reply = &replies(&events)[0];
    assert_eq!(
        (reply.metadata.id, reply.metadata.truncation, reply.answers.len()),
        (2, false, 1)
    );

    guest.dns.handle_closed(5);
    assert_eq!(
        guest.events(),
        [Event::Unasked {
            name: name("a.test"),
            why: Unasked::GuestGaveUp
        }]
    );
    assert_eq!(guest.dns.poll_timeout(), None);
}

#[test]
fn connections_and_their_open_queries_are_bounded() {
    let mut guest = Guest::new();
    let (zones, now) = (guest.zones.clone(), guest.now);
    let one = |n: usize| framed(&query(1, &format!("n{n}.test."), RecordType::A, false)).unwrap();
    let all: Vec<u8> = (0..=QUERIES_PER_CONNECTION_MAX).flat_map(one).collect();
    let taken = guest.dns.handle_stream(now, &zones, client(), 0, &all).unwrap();
    assert_eq!(taken, all.len() - one(QUERIES_PER_CONNECTION_MAX).len());
    guest.events();
    guest.verdict("n0.test", VerdictAction::Deny);
    assert!(guest.events().iter().any(|e| matches!(e, Event::Reply { .. })));
    assert_eq!(
        guest.dns.handle_stream(now, &zones, client(), 0, &all[taken..]),
        Some(all.len() - taken)
    );

    for n in 1..CONNECTIONS_MAX as u64 {
        assert_eq!(guest.dns.handle_stream(now, &zones, client(), n, &[0]), Some(1));
    }
    assert_eq!(guest.dns.handle_stream(now, &zones, client(), 999, &[0]), None);
    assert_eq!(guest.dns.counts().connections_full, 1);
    guest.dns.handle_closed(3);
    assert_eq!(guest.dns.handle_stream(now, &zones, client(), 999, &[0]), Some(1));
}

#[test]
fn the_root_is_not_looked_up() {
    let mut guest = Guest::new();
    guest.ask(1, ".", RecordType::NS);
    assert_eq!(
        replies(&guest.events())[0].metadata.response_code,
        ResponseCode::Refused
    );
}

#[test]
fn a_long_local_answer_is_cut_for_udp_and_whole_over_tcp() {
    let mut guest = Guest::new();
    // Asked for in another case, no name in the answer is a pointer to the question.
    let long = ["a".repeat(60), "b".repeat(60), "c".repeat(60), "d".repeat(60)].join(".");
    let zone = crate::zone::Zone::read(&long, [["x", "", "10.0.0.1"]].into_iter(), "").unwrap();
    guest.zones.set(zone).unwrap();
    let asked = format!("NO.{}.", long.to_ascii_uppercase());
    guest.ask(1, &asked, RecordType::A);
    let reply = &replies(&guest.events())[0];
    assert!(reply.metadata.truncation && reply.authorities.is_empty());
    let (zones, now) = (guest.zones.clone(), guest.now);
    let whole = framed(&query(1, &asked, RecordType::A, false)).unwrap();
    guest.dns.handle_stream(now, &zones, client(), 1, &whole);
    let reply = &replies(&guest.events())[0];
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(reply.authorities.len(), 1);
}

#[test]
fn no_bytes_make_it_panic() {
    let mut guest = Guest::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state % below as u64).unwrap()
    };
    let (zones, good) = (
        guest.zones.clone(),
        query(1, "host.docker.internal.", RecordType::A, true),
    );
    for round in 0..20_000_u64 {
        let mut bytes = good.clone();
        for _ in 0..random(5) {
            let at = random(bytes.len());
            bytes[at] = u8::try_from(random(256)).unwrap();
        }
        guest.now += Duration::from_millis(10);
        guest
            .dns
            .handle_query(guest.now, &zones, client(), Transport::Udp, &bytes);
        let taken = guest.dns.handle_stream(
            guest.now,
            &zones,
            client(),
            round % 3,
            &bytes[random(bytes.len())..],
        );
        if taken.is_none() || random(50) == 0 {
            guest.dns.handle_closed(round % 3);
        }
        for event in guest.events() {
            match event {
                Event::Ask { name, .. } => {
                    let action = [VerdictAction::Allow, VerdictAction::Deny, VerdictAction::Drop][random(3)];
                    guest
                        .dns
                        .handle_name_verdict(guest.now, &name, action, &Reason::default(), 0);
                }
                Event::Upstream { query, .. } => guest.dns.handle_upstream(query, Some(&bytes)),
                _ => {}
            }
        }
        guest.dns.handle_timeout(guest.now);
    }
}

fn treated(settings: DnsSettings) -> Guest {
    let mut guest = Guest::new();
    guest.dns.set_treatment(&settings);
    guest
}

#[test]
fn times_to_live_are_held_within_the_policys_bounds_in_what_is_told_and_in_what_is_bound() {
    let seconds = Duration::from_secs;
    for (min, max, ttl, told, bound) in [
        (0, 3_600, 0, 0, 60),
        (0, 3_600, 1_000_000, 3_600, 3_630),
        // RFC 2181 §8: a time with its top bit set is zero.
        (0, 3_600, 1 << 31, 0, 60),
        (120, 300, 0, 120, 150),
        (120, 300, 1 << 31, 120, 150),
        (120, 300, 200, 200, 230),
        (120, 300, u32::MAX >> 1, 300, 330),
        // Less than what a binding has by itself.
        (0, 5, 100, 5, 35),
    ] {
        let mut guest = treated(DnsSettings {
            ttl_min: seconds(min),
            ttl_max: seconds(max),
            ..DnsSettings::default()
        });
        let query = guest.send_upstream(1, "a.test.", RecordType::A);
        let data = RData::A(Ipv4Addr::new(192, 0, 2, 7).into());
        let mut upstream = answer("a.test.", RecordType::A, &[(data, 0x1234_5678)]);
        let at = upstream
            .windows(4)
            .position(|w| w == [0x12, 0x34, 0x56, 0x78])
            .unwrap();
        upstream[at..at + 4].copy_from_slice(&u32::to_be_bytes(ttl));
        guest.dns.handle_upstream(query, Some(&upstream));
        let events = guest.events();
        assert_eq!(
            replies(&events)[0].answers[0].ttl,
            told,
            "{ttl} within {min} and {max}"
        );
        let expires_in = events.iter().find_map(|e| match e {
            Event::Bind { expires_in, .. } => Some(*expires_in),
            _ => None,
        });
        assert_eq!(expires_in, Some(seconds(bound)), "{ttl} within {min} and {max}");
    }
}

#[test]
fn a_denied_lookup_is_answered_as_the_policy_says() {
    for (deny_with, code) in [
        (DnsDenial::Refused, ResponseCode::Refused),
        (DnsDenial::NxDomain, ResponseCode::NXDomain),
        (DnsDenial::ServFail, ResponseCode::ServFail),
    ] {
        let mut guest = treated(DnsSettings {
            deny_with,
            deny_text: "ask the network team".to_owned(),
            ..DnsSettings::default()
        });
        guest.ask(1, "a.test.", RecordType::A);
        guest.verdict("a.test.", VerdictAction::Deny);
        let events = guest.events();
        let reply = &replies(&events)[0];
        assert_eq!(reply.metadata.response_code, code);
        assert_eq!(extended_error(reply), (15, "ask the network team".to_owned()));
        assert!(reply.authorities.is_empty(), "nothing that would be remembered");
    }
}

#[test]
fn beyond_a_limit_allowed_lookups_send_nothing_upstream() {
    let mut guest = treated(DnsSettings {
        names_per_domain: 50,
        ..DnsSettings::default()
    });
    let mut upstream = 0;
    for n in 0..10_000u16 {
        let name = format!("x{n}.tunnel.example.com.");
        guest.ask(n, &name, RecordType::TXT);
        guest.verdict(&name, VerdictAction::Allow);
        for event in guest.events() {
            match event {
                Event::Upstream { query, .. } => {
                    upstream += 1;
                    guest.dns.handle_upstream(query, None);
                }
                Event::Reply { bytes, .. } if n > 50 => {
                    let reply = Message::from_vec(&bytes).unwrap();
                    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
                    let (code, text) = extended_error(&reply);
                    assert_eq!(code, 18);
                    assert!(
                        text.contains("50 different names of example.com") && text.contains("namesPerDomain")
                    );
                }
                _ => {}
            }
        }
    }
    assert_eq!((upstream, guest.dns.counts().limited), (50, 9_950));
    let reached = guest.dns.take_reached();
    assert_eq!((reached.len(), reached[0].count), (1, 9_950));
}

#[test]
fn the_case_of_letters_carries_nothing_upstream_and_comes_back() {
    let mut guest = Guest::new();
    guest.ask(1, "DaTa.Example.COM.", RecordType::A);
    guest.verdict("data.example.com", VerdictAction::Allow);
    let sent = guest.events().into_iter().find_map(|e| match e {
        Event::Upstream { query, bytes } => Some((query, bytes)),
        _ => None,
    });
    let (query, bytes) = sent.unwrap();
    let asked = Message::from_vec(&bytes).unwrap();
    assert_eq!(asked.queries[0].name.to_string(), "data.example.com.");
    let data = RData::A(Ipv4Addr::new(192, 0, 2, 7).into());
    let upstream = answer("data.example.com.", RecordType::A, &[(data, 60)]);
    guest.dns.handle_upstream(query, Some(&upstream));
    let events = guest.events();
    assert_eq!(
        replies(&events)[0].queries[0].name.to_string(),
        "DaTa.Example.COM."
    );
}

#[test]
fn whatever_type_is_asked_for_nothing_leaves_before_a_yes_nor_after_a_no() {
    let upstream = |events: &[Event]| events.iter().any(|e| matches!(e, Event::Upstream { .. }));
    let kinds = (0..=300).chain([32_768, 32_769, 65_280, u16::MAX]);
    for kind in kinds.map(RecordType::from) {
        for name in ["secret.a.test.", "1.2.0.192.in-addr.arpa."] {
            let mut guest = Guest::new();
            guest.ask(1, name, kind);
            assert!(!upstream(&guest.events()), "{kind} while it is undecided");
            guest.verdict(name, VerdictAction::Deny);
            guest.ask(2, name, kind);
            guest.now += HOLD;
            guest.dns.handle_timeout(guest.now);
            assert!(!upstream(&guest.events()), "{kind} once it is denied");
        }
    }
    let mut guest = Guest::new();
    guest.send_upstream(1, "1.2.0.192.in-addr.arpa.", RecordType::PTR);
}
