//! Pending requests from the first ask to the end, with time as an argument.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{
    FlowKey, FlowSubject, ForwardTarget, Guard, LookupSubject, MissId, Protocol, Reason, Subject, Target,
    VmId,
};

use super::*;
use crate::grant::{GrantId, VmInstance, VmView};

const HOLD: Duration = Duration::from_secs(30);

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn vm(name: &str) -> VmView {
    VmView {
        name: name.into(),
        labels: BTreeMap::new(),
        instance: VmInstance(format!("boot/{name}")),
    }
}

fn tcp(peer: &str, names: &[&str]) -> Subject {
    let peer: SocketAddr = peer.parse().unwrap();
    Subject::Flow(FlowSubject {
        key: FlowKey {
            protocol: Protocol::Tcp,
            guest: "192.168.127.2:40000".parse().unwrap(),
            peer,
        },
        dialled: peer.ip(),
        names: names.iter().map(|n| n.parse().unwrap()).collect(),
        guards: Default::default(),
        peer_vm: None,
    })
}

fn guarded(peer: &str, names: &[&str]) -> Subject {
    match tcp(peer, names) {
        Subject::Flow(flow) => Subject::Flow(FlowSubject {
            guards: flow.guards.with(Guard::PrivateFromDns),
            ..flow
        }),
        lookup => lookup,
    }
}

fn lookup(name: &str, query_type: u16) -> Subject {
    Subject::Lookup(LookupSubject::new(name.parse().unwrap(), query_type))
}

fn miss(number: u64) -> MissRef {
    MissRef {
        dataplane: 1,
        miss: MissId(number),
    }
}

/// A table whose requests are `p1`, `p2` and so on, by the number of the miss that opened them.
#[derive(Default)]
struct Desk {
    table: PendingTable,
}

impl Desk {
    fn ask_of(&mut self, vm: &VmView, now: u64, number: u64, subject: Subject) -> AskOutcome {
        let ask = Ask {
            id: PendingId(format!("p{number}")),
            vm,
            peer: String::new(),
            subject,
            reason: Reason::new("default", "deny", "nothing allows it"),
            miss: miss(number),
            hold: HOLD,
            packets: 1,
            open_max: OPEN_PER_VM_MAX,
            per_minute_max: None,
        };
        self.table.ask(at(now), ask).0
    }

    fn ask(&mut self, now: u64, number: u64, subject: Subject) -> AskOutcome {
        self.ask_of(&vm("web"), now, number, subject)
    }

    fn approve(&mut self, now: u64, id: &str, scope: Option<Scope>) -> Result<Answered, AnswerError> {
        let grant = GrantId("g".into());
        self.table.answer(
            at(now),
            &PendingId(id.into()),
            None,
            Answer::Approve,
            scope,
            false,
            grant,
        )
    }

    fn get(&self, id: &str) -> &Request {
        self.table.get(&PendingId(id.into())).unwrap()
    }

    fn quote(&self, id: &str, scope: Scope) -> Result<String, AnswerError> {
        self.table
            .quote(&PendingId(id.into()), None, Some(scope), false)
            .map(|t| t.to_string())
    }
}

fn opened(number: u64) -> AskOutcome {
    AskOutcome::Opened(PendingId(format!("p{number}")))
}

fn joined(number: u64) -> AskOutcome {
    AskOutcome::Joined(PendingId(format!("p{number}")))
}

#[test]
fn misses_that_ask_the_same_join_one_request() {
    let mut desk = Desk::default();
    assert_eq!(desk.ask(0, 1, tcp("1.2.3.4:443", &[])), opened(1));
    assert_eq!(desk.ask(1, 2, tcp("1.2.3.4:443", &[])), joined(1));
    assert_eq!(desk.ask(1, 3, tcp("1.2.3.4:80", &[])), opened(3));
    assert_eq!(desk.ask(1, 4, tcp("1.2.3.5:443", &[])), opened(4));
    assert_eq!(desk.ask_of(&vm("db"), 1, 5, tcp("1.2.3.4:443", &[])), opened(5));
    let request = desk.get("p1");
    assert_eq!(
        (request.count, request.held_packets(), request.held_until()),
        (2, 2, Some(at(31)))
    );
    assert_eq!(
        desk.table
            .open()
            .iter()
            .map(|r| r.id.0.as_str())
            .collect::<Vec<_>>(),
        ["p1", "p3", "p4", "p5"]
    );
    assert_eq!(desk.table.open_count_of(&vm("web").instance), 3);
}

#[test]
fn the_a_aaaa_pair_and_rotating_addresses_of_a_name_are_one_question() {
    let mut desk = Desk::default();
    assert_eq!(desk.ask(0, 1, lookup("a.test", 1)), opened(1));
    assert_eq!(desk.ask(0, 2, lookup("a.test", 28)), joined(1));
    assert_eq!(desk.ask(0, 3, tcp("1.2.3.4:443", &["a.test"])), opened(3));
    assert_eq!(desk.ask(0, 4, tcp("1.2.3.5:443", &["a.test"])), joined(3));
    assert_eq!(
        desk.ask(0, 5, guarded("10.0.0.5:443", &["a.test"])),
        opened(5),
        "a guard asks by address"
    );
}

#[test]
fn a_miss_that_is_announced_again_is_not_counted_twice() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &[]));
    assert_eq!(desk.ask(10, 1, tcp("1.2.3.4:443", &[])), joined(1));
    let request = desk.get("p1");
    assert_eq!(
        (request.count, request.held.len(), request.held_until()),
        (1, 1, Some(at(40)))
    );
}

#[test]
fn a_yes_releases_everything_held_and_names_the_grants_target() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &["a.test"]));
    desk.ask(0, 2, tcp("1.2.3.5:443", &["a.test"]));
    let answered = desk.approve(5, "p1", None).unwrap();
    assert_eq!(
        answered.target.to_string(),
        "domain a.test:443",
        "the narrowest, by name"
    );
    assert_eq!(answered.vm, vm("web"));
    assert_eq!(
        answered.changes.changes,
        [Change::Removed(PendingId("p1".into()))]
    );
    let misses: Vec<MissRef> = answered.changes.released.iter().map(|r| r.miss).collect();
    assert_eq!(misses, [miss(1), miss(2)]);
    let request = desk.get("p1");
    assert_eq!(
        (request.state, request.grant.as_ref()),
        (PendingState::Approved, Some(&GrantId("g".into())))
    );
    assert_eq!((desk.table.open_count(), desk.table.next_expiry()), (0, None));
    assert_eq!(
        desk.ask(6, 3, tcp("1.2.3.4:443", &["a.test"])),
        opened(3),
        "what asks again is a new question"
    );
}

#[test]
fn of_two_clients_that_answer_one_has_effect() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &[]));
    let id = PendingId("p1".into());
    desk.approve(1, "p1", None).unwrap();
    let no = desk
        .table
        .answer(at(1), &id, None, Answer::Deny, None, false, GrantId("h".into()));
    assert_eq!(
        no,
        Err(AnswerError::NotOpen {
            id,
            state: PendingState::Approved
        })
    );
    assert_eq!(desk.get("p1").grant, Some(GrantId("g".into())));
}

#[test]
fn an_etag_changes_with_what_is_asked_and_not_with_its_count() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &["a.test"]));
    let shown = desk.get("p1").etag();
    desk.ask(1, 2, tcp("1.2.3.4:443", &["a.test"]));
    assert_eq!(desk.get("p1").etag(), shown);
    desk.ask(2, 3, tcp("1.2.3.4:80", &["a.test"]));
    let other = desk.get("p3").etag();
    let id = PendingId("p1".into());
    let old = desk.table.quote(&id, Some(&other), None, false);
    assert_eq!(old, Err(AnswerError::Changed { id: id.clone() }));
    assert!(desk.table.quote(&id, Some(&shown), None, false).is_ok());
    desk.approve(3, "p1", None).unwrap();
    assert_ne!(desk.get("p1").etag(), shown, "it is no longer open");
}

#[test]
fn what_is_asked_under_an_id_never_changes() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &["a.test"]));
    desk.ask(0, 2, tcp("1.2.3.4:80", &[]));
    let shown = |desk: &Desk, id: &str| {
        let request = desk.get(id);
        let targets: Vec<_> = request.scopes().into_iter().map(|s| desk.quote(id, s)).collect();
        (request.names.clone(), request.guards, request.etag(), targets)
    };
    let before = [shown(&desk, "p1"), shown(&desk, "p2")];

    // Other names for the same, and other addresses of the same name, join and change nothing.
    assert_eq!(
        desk.ask(1, 3, tcp("1.2.3.4:443", &["a.test", "b.test"])),
        joined(1)
    );
    assert_eq!(
        desk.ask(1, 4, tcp("9.9.9.9:443", &["a.test", "c.test"])),
        joined(1)
    );
    // What an answer would reach further for asks by itself: a name, a guard, an address that is dialled.
    assert_eq!(desk.ask(1, 5, tcp("1.2.3.4:80", &["a.test"])), opened(5));
    assert_eq!(desk.ask(1, 6, guarded("1.2.3.4:80", &[])), opened(6));
    let alias = |peer_vm| match tcp("1.2.3.4:80", &[]) {
        Subject::Flow(flow) => Subject::Flow(FlowSubject {
            dialled: "127.0.0.1".parse().unwrap(),
            peer_vm,
            ..flow
        }),
        lookup => lookup,
    };
    assert_eq!(desk.ask(1, 7, alias(None)), opened(7));
    // The same address, which another guest has by now.
    assert_eq!(desk.ask(1, 8, alias(Some(VmId(2)))), opened(8));
    assert_eq!(desk.ask(1, 9, alias(Some(VmId(3)))), opened(9));

    assert_eq!([shown(&desk, "p1"), shown(&desk, "p2")], before);
}

#[test]
fn the_beginning_of_an_id_never_means_a_request_that_came_later() {
    let mut desk = Desk::default();
    let ask = |desk: &mut Desk, now, id: &str, number: u64, port: u64| {
        let vm = vm("web");
        let ask = Ask {
            id: PendingId(id.into()),
            vm: &vm,
            peer: String::new(),
            subject: tcp(&format!("1.2.3.4:{port}"), &[]),
            reason: Reason::new("default", "deny", ""),
            miss: miss(number),
            hold: HOLD,
            packets: 1,
            open_max: OPEN_PER_VM_MAX,
            per_minute_max: None,
        };
        desk.table.ask(at(now), ask);
    };
    ask(&mut desk, 0, "bpvh846r", 1, 80);
    let found = |desk: &Desk, now, prefix: &str| desk.table.find(at(now), prefix).map(|r| r.id.0.clone());
    assert_eq!(found(&desk, 0, "bpvh").unwrap(), "bpvh846r");
    // The guest gives up, and asks for something else whose id begins alike.
    desk.table.miss_ended(at(1), miss(1), MissEnd::GuestGaveUp);
    ask(&mut desk, 2, "bpvh0000", 2, 22);
    let ambiguous = FindError::Ambiguous {
        prefix: "bpvh".to_owned(),
        count: 2,
    };
    assert_eq!(found(&desk, 3, "bpvh"), Err(ambiguous));
    assert_eq!(
        found(&desk, 3, "bpvh8").unwrap(),
        "bpvh846r",
        "to say that it ended"
    );
    assert_eq!(found(&desk, 3, "bpvh0000").unwrap(), "bpvh0000");
    // A day later nobody has it in mind.
    desk.table.miss_ended(at(4), miss(2), MissEnd::GuestGaveUp);
    let day = RETIRED_FOR.as_secs() + 4;
    ask(&mut desk, day, "cccc0000", 3, 22);
    desk.table.miss_ended(at(day), miss(3), MissEnd::GuestGaveUp);
    ask(&mut desk, day, "bpvh1111", 4, 22);
    assert_eq!(found(&desk, day, "bpvh").unwrap(), "bpvh1111");
}

#[test]
fn beginnings_of_ids_are_not_taken_once_some_are_forgotten() {
    let mut desk = Desk::default();
    let mut opened = 0;
    let mut open_one = |desk: &mut Desk, now| {
        opened += 1;
        desk.ask(now, opened, tcp("1.2.3.4:80", &[]));
        desk.table.miss_ended(at(now), miss(opened), MissEnd::GuestGaveUp);
        format!("p{opened}")
    };
    for _ in 0..RETIRED_MAX {
        open_one(&mut desk, 0);
    }
    assert_eq!(desk.table.retired_count(), RETIRED_MAX);
    assert!(desk.table.find(at(1), "p65536").is_ok());
    assert!(matches!(
        desk.table.find(at(1), "p6553"),
        Err(FindError::Ambiguous { count: 8, .. })
    ));
    let last = open_one(&mut desk, 1);
    assert_eq!(desk.table.retired_count(), RETIRED_MAX, "it stays bounded");
    assert_eq!(
        desk.table.find(at(1), "p6553").map(|_| ()),
        Err(FindError::Forgotten("p6553".to_owned()))
    );
    assert_eq!(desk.table.find(at(1), &last).unwrap().id.0, last, "a whole id is");
    assert!(
        desk.table
            .find(at(RETIRED_FOR.as_secs()), "p6553")
            .is_err_and(|e| matches!(e, FindError::Ambiguous { .. }))
    );
}

#[test]
fn scopes_are_offered_narrowest_first_and_yield_their_targets() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &["www.example.co.uk"]));
    desk.ask(0, 2, tcp("1.2.3.4:80", &[]));
    desk.ask(0, 3, guarded("10.0.0.5:443", &["www.example.co.uk"]));
    desk.ask(0, 4, lookup("a.b.example.com", 1));
    desk.ask(0, 5, tcp("1.2.3.4:22", &["example.com"]));
    use Scope::{Host, HostPort, Name, NamePort, Subdomains};
    assert_eq!(
        desk.get("p1").scopes(),
        [NamePort, HostPort, Host, Name, Subdomains]
    );
    assert_eq!(desk.get("p2").scopes(), [HostPort, Host]);
    assert_eq!(
        desk.get("p3").scopes(),
        [HostPort],
        "a guarded destination offers only itself"
    );
    assert_eq!(desk.get("p4").scopes(), [Name, Subdomains]);
    assert_eq!(
        desk.get("p5").scopes(),
        [NamePort, HostPort, Host, Name],
        "*.example.com leaves it out"
    );
    for (id, scope, target) in [
        ("p1", NamePort, "domain www.example.co.uk:443"),
        ("p1", HostPort, "tcp 1.2.3.4:443"),
        ("p1", Host, "tcp 1.2.3.4"),
        ("p1", Name, "domain www.example.co.uk"),
        ("p1", Subdomains, "domain *.example.co.uk"),
        ("p3", HostPort, "tcp 10.0.0.5:443"),
        ("p4", Name, "domain a.b.example.com"),
        ("p4", Subdomains, "domain *.example.com"),
    ] {
        assert_eq!(desk.quote(id, scope).unwrap(), target);
    }
    for (id, scope) in [
        ("p2", Name),
        ("p3", Host),
        ("p3", NamePort),
        ("p4", HostPort),
        ("p5", Subdomains),
    ] {
        assert!(
            matches!(desk.quote(id, scope), Err(AnswerError::Scope { .. })),
            "{id} {scope}"
        );
    }
}

#[test]
fn icmp_is_asked_and_answered_by_address() {
    let mut desk = Desk::default();
    let Subject::Flow(flow) = tcp("1.2.3.4:1", &["a.test"]) else {
        unreachable!()
    };
    let peer = "1.2.3.4:0".parse().unwrap();
    let key = FlowKey {
        protocol: Protocol::Icmp,
        peer,
        ..flow.key
    };
    desk.ask(0, 1, Subject::Flow(FlowSubject { key, ..flow }));
    assert_eq!(desk.get("p1").scopes(), [Scope::HostPort]);
    assert_eq!(desk.quote("p1", Scope::HostPort).unwrap(), "icmp 1.2.3.4");
}

#[test]
fn only_a_lookup_can_be_allowed_alone() {
    let mut desk = Desk::default();
    desk.ask(0, 1, lookup("a.test", 1));
    desk.ask(0, 2, tcp("1.2.3.4:443", &["a.test"]));
    let quote = |id: &str| desk.table.quote(&PendingId(id.into()), None, None, true);
    assert_eq!(quote("p1").unwrap().to_string(), "lookup a.test");
    assert!(matches!(quote("p2"), Err(AnswerError::NotALookup { .. })));
}

#[test]
fn a_late_yes_serves_the_next_attempt() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &[]));
    let changes = desk.table.miss_ended(at(30), miss(1), MissEnd::HoldExpired);
    assert_eq!(changes.changes, [Change::Updated(PendingId("p1".into()))]);
    assert!(desk.get("p1").is_open() && desk.get("p1").held.is_empty());
    let answered = desk.approve(200, "p1", None).unwrap();
    assert!(answered.changes.released.is_empty());
    assert_eq!(answered.target.to_string(), "tcp 1.2.3.4:443");
}

#[test]
fn what_parks_holds_nothing_and_lives_as_long_as_what_is_held() {
    let mut desk = Desk::default();
    let web = vm("web");
    let park = |number, subject| Ask {
        id: PendingId(format!("p{number}")),
        vm: &web,
        peer: String::new(),
        subject,
        reason: Reason::new("default", "deny", "nothing allows it"),
        miss: miss(number),
        hold: Duration::ZERO,
        packets: 1,
        open_max: OPEN_PER_VM_MAX,
        per_minute_max: None,
    };
    let (outcome, _) = desk.table.ask(at(0), park(1, tcp("192.0.2.7:443", &[])));
    assert_eq!(outcome, opened(1));
    let (outcome, _) = desk.table.ask(at(5), park(2, tcp("192.0.2.7:443", &[])));
    assert_eq!(outcome, joined(1));
    let request = desk.get("p1");
    assert_eq!(
        (request.count, request.held_packets(), request.held_until()),
        (2, 0, None)
    );
    // One that was held before nothing was to be held any more.
    assert_eq!(desk.ask(6, 3, tcp("192.0.2.8:443", &[])), opened(3));
    desk.table.ask(at(7), park(3, tcp("192.0.2.8:443", &[])));
    assert_eq!(desk.get("p3").held_packets(), 0);
    assert!(
        desk.table
            .miss_ended(at(8), miss(3), MissEnd::GuestGaveUp)
            .changes
            .is_empty()
    );
    desk.table.expire(at(604));
    assert!(desk.get("p1").is_open() && desk.get("p3").is_open());
    let answered = desk.approve(604, "p1", None).unwrap();
    assert!(answered.changes.released.is_empty());
    desk.table.expire(at(607));
    assert_eq!(desk.get("p3").state, PendingState::Expired);
}

#[test]
fn a_request_says_the_registrable_domain_that_it_belongs_to() {
    let mut desk = Desk::default();
    desk.ask(0, 1, lookup("a.b.example.co.uk", 1));
    desk.ask(0, 2, tcp("192.0.2.7:443", &["example.co.uk"]));
    desk.ask(0, 3, tcp("192.0.2.7:443", &[]));
    desk.ask(0, 4, lookup("co.uk", 1));
    assert_eq!(desk.get("p1").domain(), Some("example.co.uk"));
    assert_eq!(desk.get("p2").domain(), Some("example.co.uk"));
    assert_eq!(desk.get("p3").domain(), None);
    assert_eq!(desk.get("p4").domain(), None);
}

#[test]
fn a_request_whose_guest_gave_up_is_cancelled_unless_it_may_come_back() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &[]));
    desk.ask(0, 2, tcp("1.2.3.4:443", &[]));
    desk.table.miss_ended(at(1), miss(1), MissEnd::GuestGaveUp);
    assert!(desk.get("p1").is_open(), "another attempt still waits");
    let changes = desk.table.miss_ended(at(2), miss(2), MissEnd::GuestGaveUp);
    assert_eq!(changes.changes, [Change::Removed(PendingId("p1".into()))]);
    assert_eq!(desk.get("p1").state, PendingState::Cancelled);

    desk.ask(10, 3, tcp("1.2.3.4:443", &[]));
    desk.table.miss_ended(at(40), miss(3), MissEnd::HoldExpired);
    desk.ask(41, 4, tcp("1.2.3.4:443", &[]));
    desk.table.miss_ended(at(42), miss(4), MissEnd::GuestGaveUp);
    assert!(
        desk.get("p3").is_open(),
        "a hold ran out before: the guest may try again"
    );
    assert_eq!(
        desk.table.miss_ended(at(43), miss(99), MissEnd::GuestGaveUp),
        Changes::default()
    );
}

#[test]
fn a_request_lives_ten_minutes_from_its_last_ask() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &[]));
    assert_eq!(desk.get("p1").expires_at, at(600));
    assert_eq!(desk.table.next_expiry(), Some(at(32)));
    assert_eq!(desk.table.expire(at(31)), Changes::default());
    let changes = desk.table.expire(at(32));
    assert_eq!(changes.changes, [Change::Updated(PendingId("p1".into()))]);
    assert!(
        changes.released.is_empty(),
        "the dataplane refused it by its own clock"
    );
    assert_eq!(desk.table.next_expiry(), Some(at(600)));
    desk.ask(100, 2, tcp("1.2.3.4:443", &[]));
    assert_eq!(desk.get("p1").expires_at, at(700));
    assert!(desk.table.expire(at(699)).changes.len() == 1 && desk.get("p1").is_open());
    let changes = desk.table.expire(at(700));
    assert_eq!(changes.changes, [Change::Removed(PendingId("p1".into()))]);
    assert_eq!(
        (desk.get("p1").state, desk.table.next_expiry()),
        (PendingState::Expired, None)
    );
    assert!(matches!(
        desk.approve(701, "p1", None),
        Err(AnswerError::NotOpen { .. })
    ));
}

#[test]
fn a_vm_that_stops_takes_its_requests_along() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &[]));
    desk.ask(0, 2, lookup("a.test", 1));
    desk.ask_of(&vm("db"), 0, 3, tcp("1.2.3.4:443", &[]));
    let changes = desk.table.vm_stopped(at(1), &vm("web").instance);
    assert_eq!((changes.changes.len(), desk.table.open_count()), (2, 1));
    assert_eq!(changes.released, [], "nobody is there to be answered");
    assert_eq!(desk.get("p1").state, PendingState::Cancelled);
    assert_eq!(desk.table.open_count_of(&vm("web").instance), 0);
}

#[test]
fn what_a_change_decides_is_answered() {
    let mut desk = Desk::default();
    desk.ask(0, 1, tcp("1.2.3.4:443", &["a.test"]));
    desk.ask(0, 2, tcp("1.2.3.5:443", &["a.test"]));
    desk.ask(0, 3, tcp("9.9.9.9:443", &[]));
    let asks = |decided: &'static str| {
        move |_: &VmView, subject: &Subject| match subject {
            Subject::Flow(flow) => flow.key.peer.ip().to_string() != decided,
            Subject::Lookup(_) => true,
        }
    };
    let changes = desk.table.decide_again(at(1), asks("9.9.9.9"), |_, _| true);
    assert_eq!(changes.changes, [Change::Removed(PendingId("p3".into()))]);
    assert_eq!(changes.released[0].miss, miss(3));
    assert_eq!(desk.get("p3").state, PendingState::Decided);

    let changes = desk.table.decide_again(at(1), asks("1.2.3.5"), |_, _| true);
    assert_eq!(changes.changes, [Change::Updated(PendingId("p1".into()))]);
    assert_eq!(
        changes.released.iter().map(|r| r.miss).collect::<Vec<_>>(),
        [miss(2)]
    );
    assert!(desk.get("p1").is_open());
    assert_eq!(
        desk.table.decide_again(at(2), |_, _| true, |_, _| true),
        Changes::default()
    );
}

#[test]
fn a_vms_requests_are_capped_and_another_vm_is_not_hurt() {
    let mut desk = Desk::default();
    let number = |n: usize| u64::try_from(n).unwrap();
    let subject = |n: usize| tcp(&format!("1.2.{}.{}:443", n / 250, n % 250), &[]);
    for n in 0..OPEN_PER_VM_MAX {
        assert_eq!(desk.ask(0, number(n), subject(n)), opened(number(n)));
    }
    for (extra, expected) in [(0, 1), (1, 2)] {
        let n = OPEN_PER_VM_MAX + extra;
        match desk.ask(0, number(n), subject(n)) {
            AskOutcome::Refused {
                limit: Limit::OpenPerVm,
                count,
                reason,
            } => {
                assert_eq!(count, expected);
                assert!(reason.text.contains("1024"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        desk.ask(0, 5_000, subject(0)),
        joined(0),
        "what is asked already may join"
    );
    assert_eq!(desk.ask_of(&vm("db"), 0, 6_000, subject(9)), opened(6_000));
    desk.approve(1, "p0", None).unwrap();
    assert_eq!(desk.ask(1, 7_000, subject(0)), opened(7_000));
    assert_eq!(desk.table.refused_count_of(&vm("web").instance), 2);
}

#[test]
fn requests_of_all_vms_together_are_capped() {
    let mut desk = Desk::default();
    let mut number = 0;
    for index in 0..OPEN_MAX / OPEN_PER_VM_MAX {
        let vm = vm(&format!("vm{index}"));
        for n in 0..OPEN_PER_VM_MAX {
            number += 1;
            desk.ask_of(
                &vm,
                0,
                number,
                tcp(&format!("1.2.{}.{}:443", n / 250, n % 250), &[]),
            );
        }
    }
    assert_eq!(desk.table.open_count(), OPEN_MAX);
    let refused = desk.ask_of(&vm("late"), 0, number + 1, tcp("1.2.3.4:443", &[]));
    assert!(matches!(
        refused,
        AskOutcome::Refused {
            limit: Limit::Open,
            count: 1,
            ..
        }
    ));
    assert_eq!(desk.table.expire(at(600)).changes.len(), OPEN_MAX);
    assert_eq!(desk.table.open_count(), 0);
    let kept = (1..=number)
        .filter(|n| desk.table.get(&PendingId(format!("p{n}"))).is_some())
        .count();
    assert_eq!(kept, RECENT_MAX);
}

#[test]
fn what_is_held_for_one_vm_is_capped() {
    let mut desk = Desk::default();
    let most = u64::try_from(HELD_PER_VM_MAX).unwrap();
    for number in 0..most {
        desk.ask(0, number, tcp("1.2.3.4:443", &[]));
    }
    let refused = desk.ask(0, most, tcp("1.2.3.4:443", &[]));
    assert!(matches!(
        refused,
        AskOutcome::Refused {
            limit: Limit::HeldPerVm,
            ..
        }
    ));
    desk.table.miss_ended(at(1), miss(3), MissEnd::Evicted);
    assert_eq!(desk.ask(1, most, tcp("1.2.3.4:443", &[])), joined(0));
    assert_eq!(desk.get("p0").held.len(), HELD_PER_VM_MAX);
}

#[test]
fn names_of_a_request_are_capped() {
    let mut desk = Desk::default();
    let names: Vec<String> = (0..40).map(|n| format!("n{n}.test")).collect();
    let mut all = vec!["a.test"];
    all.extend(names.iter().map(String::as_str));
    desk.ask(0, 0, tcp("1.2.3.4:443", &all));
    assert_eq!(desk.get("p0").names.len(), NAMES_PER_REQUEST_MAX);
    assert_eq!(desk.get("p0").names[0].as_str(), "a.test");
}

#[test]
fn ids_are_found_whole_or_by_four_characters_that_fit_one() {
    let mut desk = Desk::default();
    desk.ask(0, 1000, tcp("1.2.3.4:443", &[]));
    desk.ask(0, 1001, tcp("1.2.3.4:80", &[]));
    desk.ask(0, 2, tcp("1.2.3.4:81", &[]));
    let found = |desk: &Desk, prefix: &str| desk.table.find(at(1), prefix).map(|r| r.id.0.clone());
    assert_eq!(found(&desk, "p1001").unwrap(), "p1001");
    let many = FindError::Ambiguous {
        prefix: "p100".into(),
        count: 2,
    };
    assert_eq!(found(&desk, "p100"), Err(many));
    assert_eq!(found(&desk, "p2").unwrap(), "p2", "a whole id, however short");
    for short in ["", "p", "p10"] {
        assert_eq!(found(&desk, short), Err(FindError::Short(short.into())));
    }
    assert_eq!(found(&desk, "xxxx"), Err(FindError::NotFound("xxxx".into())));
    desk.approve(1, "p1001", None).unwrap();
    assert_eq!(
        found(&desk, "p1001").unwrap(),
        "p1001",
        "lately answered ones are found too"
    );
}

fn forward(text: &str) -> ForwardTarget {
    text.parse().unwrap()
}

impl Desk {
    fn ask_forward(&mut self, now: u64, number: u64, text: &str) -> AskOutcome {
        let ask = AskForward {
            id: PendingId(format!("p{number}")),
            vm: &vm("web"),
            forward: forward(text),
            reason: Reason::new("default", "deny", "nothing allows it"),
            hold: HOLD,
            open_max: OPEN_PER_VM_MAX,
            per_minute_max: None,
        };
        self.table.ask_forward(at(now), ask).0
    }
}

#[test]
fn a_forward_is_asked_for_once_and_answered_for_itself_alone() {
    let mut desk = Desk::default();
    let text = "127.0.0.1:8080:80/tcp";
    assert_eq!(desk.ask_forward(0, 1, text), opened(1));
    assert_eq!(desk.ask_forward(1, 2, text), joined(1));
    for (number, other) in [
        (3, "127.0.0.1:8080:80/udp"),
        (4, "127.0.0.1:8080:81/tcp"),
        (5, "127.0.0.1:8081:80/tcp"),
        (6, "[::1]:8080:80/tcp"),
    ] {
        assert_eq!(desk.ask_forward(1, number, other), opened(number), "{other}");
    }
    let request = desk.get("p1");
    assert_eq!((request.count, request.held_packets()), (2, 0));
    assert_eq!(request.scopes(), [Scope::HostPort]);
    let refused = desk.approve(2, "p1", Some(Scope::Host)).unwrap_err();
    assert!(matches!(refused, AnswerError::Scope { .. }), "{refused}");
    let answered = desk.approve(2, "p1", None).unwrap();
    assert_eq!(answered.target, Target::Forward(forward(text)));
    assert_eq!(answered.changes.released, []);
    assert_eq!(
        desk.ask_forward(3, 7, text),
        opened(7),
        "that one is answered for good"
    );
}

#[test]
fn a_request_for_a_forward_outlives_its_call_and_ends_with_its_life_and_its_vm() {
    let mut desk = Desk::default();
    desk.ask_forward(0, 1, "127.0.0.1:8080:80/tcp");
    desk.table.expire(at(500));
    desk.ask_forward(500, 2, "127.0.0.1:8080:80/tcp");
    desk.table.expire(at(1_099));
    assert!(desk.get("p1").is_open(), "asked again, it lives on");
    let changes = desk.table.expire(at(1_101));
    assert_eq!(changes.changes, [Change::Removed(PendingId("p1".into()))]);
    desk.ask_forward(2_000, 3, "127.0.0.1:8080:80/tcp");
    desk.table.vm_stopped(at(2_001), &vm("web").instance);
    assert_eq!(desk.get("p3").state, PendingState::Cancelled);
}

#[test]
fn forwards_and_flows_of_a_vm_have_one_limit_together() {
    let mut desk = Desk::default();
    for n in 0..OPEN_PER_VM_MAX - 1 {
        desk.ask(
            0,
            u64::try_from(n).unwrap(),
            tcp(&format!("1.2.{}.{}:443", n / 250, n % 250), &[]),
        );
    }
    assert_eq!(desk.ask_forward(0, 9_001, "127.0.0.1:1:1/tcp"), opened(9_001));
    for outcome in [
        desk.ask_forward(0, 9_002, "127.0.0.1:2:1/tcp"),
        desk.ask(0, 9_003, tcp("9.9.9.9:9", &[])),
    ] {
        assert!(
            matches!(
                outcome,
                AskOutcome::Refused {
                    limit: Limit::OpenPerVm,
                    ..
                }
            ),
            "{outcome:?}"
        );
    }
    assert_eq!(desk.ask_forward(0, 9_004, "127.0.0.1:1:1/tcp"), joined(9_001));
}

#[test]
fn a_request_for_a_forward_that_is_decided_ends() {
    let mut desk = Desk::default();
    desk.ask_forward(0, 1, "127.0.0.1:8080:80/tcp");
    desk.ask_forward(0, 2, "127.0.0.1:8081:80/tcp");
    let asks = |_: &VmView, forward: &ForwardTarget| forward.listen().port() == 8081;
    desk.table
        .decide_again(at(1), |_, _| panic!("no flow is asked for"), asks);
    assert_eq!(desk.get("p1").state, PendingState::Decided);
    assert!(desk.get("p2").is_open());
}
