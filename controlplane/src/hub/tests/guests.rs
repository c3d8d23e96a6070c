//! Two VMs of one dataplane: what one opens to the other.

use vnet_proto::model::{FlowSubject, Guard, GuardSet, Subject, VmId};

use super::*;

const DB: &str = "192.168.127.3:5432";
const OPENS_DB: &str = "rules: [{name: to-db, action: allow, cidr: 192.168.127.3/32, vm: {name: web}}]";

/// VMs web (1) and db (2), the second at its address.
fn two(rig: &Rig) -> FakeDataplane {
    let dp = rig.dataplane_with(hello(1, vec![vm_up(1, "web"), vm_up(2, "db")]));
    dp.say(Message::VmStatus(v1::VmStatus {
        vm: 2,
        addresses: vec!["192.168.127.3".to_owned()],
        attached: true,
        ..Default::default()
    }));
    dp
}

/// A flow from web to db.
fn to_db() -> Subject {
    match flow(DB, &[]) {
        Subject::Flow(flow) => Subject::Flow(FlowSubject {
            guards: GuardSet::EMPTY.with(Guard::Guest),
            peer_vm: Some(VmId(2)),
            ..flow
        }),
        lookup => lookup,
    }
}

fn open_to_db(dp: &mut FakeDataplane) -> u64 {
    let verdict = dp.verdict(to_db());
    assert_eq!(verdict.action, ALLOW, "{verdict:?}");
    dp.open(&to_db(), epoch_of(&verdict), &verdict.grant_id)
}

#[test]
fn only_what_names_the_other_guest_opens_it_and_both_open_are_open() {
    let rig = Rig::open();
    let mut dp = two(&rig);
    assert_eq!(dp.verdict(to_db()).action, ALLOW, "nothing is given");
    rig.apply("rules: [{action: allow, cidr: 0.0.0.0/0}]");
    assert_eq!(dp.verdict(to_db()).action, DENY);
    rig.apply(OPENS_DB);
    let verdict = dp.verdict(to_db());
    assert_eq!(verdict.action, ALLOW);
    let Some(v1::verdict::Match::Flow(found)) = verdict.r#match else {
        panic!()
    };
    assert_eq!(
        (found.prefix_length, found.first_port, found.last_port),
        (32, 5432, 5432)
    );
}

#[test]
fn a_guest_that_has_come_under_a_mode_is_closed_to_an_open_one() {
    let rig = Rig::open();
    let mut dp = two(&rig);
    let flow_id = open_to_db(&mut dp);
    rig.hub.update_vm(set_mode("db", Mode::Enforce)).unwrap();
    let told = dp.told();
    assert_eq!(
        cuts(&told),
        [flow_id],
        "web's flow, though nothing changed about web"
    );
    assert!(told.iter().any(|t| matches!(t, Told::Revoke(_))));
    assert_eq!(dp.verdict(to_db()).action, DENY);
}

#[test]
fn a_block_of_the_other_guest_cuts_what_was_open_to_it_and_decides_what_waits() {
    for mode in [Mode::Block, Mode::Quarantine] {
        let rig = Rig::open();
        let mut dp = two(&rig);
        rig.apply(OPENS_DB);
        dp.told();
        let flow_id = open_to_db(&mut dp);
        rig.hub.update_vm(set_mode("db", mode)).unwrap();
        assert_eq!(cuts(&dp.told()), [flow_id], "{mode}");
        let verdict = dp.verdict(to_db());
        assert_eq!(verdict.action, DENY);
        assert_eq!(verdict.reason.unwrap().subject, mode.to_string());
    }
    let rig = Rig::secure();
    let mut dp = two(&rig);
    let (miss, _) = dp.held(to_db());
    rig.hub.update_vm(set_mode("db", Mode::Block)).unwrap();
    let answered = verdicts(&dp.told());
    assert_eq!((answered[0].miss_id, answered[0].action), (miss.0, DENY));
    assert!(rig.hub.pending(Which::default()).is_empty());
}

#[test]
fn a_question_about_another_guest_names_it_and_is_answered_for_that_address_alone() {
    let rig = Rig::secure();
    let mut dp = two(&rig);
    let (miss, id) = dp.held(to_db());
    let request = rig.hub.pending_request(&id).unwrap();
    assert_eq!(request.peer_vm, "db");
    assert_eq!(request.guards, [v1::Guard::Guest as i32]);
    assert_eq!(request.scopes, [v1::Scope::HostPort as i32]);
    let (request, grant, ..) = rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    assert_eq!(request.peer_vm, "db");
    let target = Target::try_from(grant.target.unwrap()).unwrap();
    assert_eq!(target.to_string(), "tcp 192.168.127.3:5432");
    let answered = verdicts(&dp.told());
    assert_eq!((answered[0].miss_id, answered[0].action), (miss.0, ALLOW));
    let mut elsewhere = to_db();
    if let Subject::Flow(flow) = &mut elsewhere {
        flow.key.peer.set_port(22);
    }
    dp.held(elsewhere);
}

#[test]
fn flows_events_and_explanations_say_whose_the_address_is() {
    let rig = Rig::open();
    let mut dp = two(&rig);
    let filter = EventFilter::default();
    let (mut watch, _) = rig.hub.watch_events(filter).unwrap();
    rig.apply(OPENS_DB);
    let flow_id = open_to_db(&mut dp);
    let flows = rig.hub.flows(Which::default());
    assert_eq!(flows.len(), 1);
    assert_eq!(
        (flows[0].1.vm.as_str(), flows[0].1.peer_vm.as_str()),
        ("web", "db")
    );
    dp.say(Message::FlowClosed(v1::FlowClosed {
        flow_id,
        end: v1::FlowEnd::Finished.into(),
        ..Default::default()
    }));
    let mut texts = Vec::new();
    while let Some(Next::Change(event)) = watch.try_next() {
        if event.peer_vm == "db" {
            texts.push(event.text);
        }
    }
    assert_eq!(
        texts,
        [
            "web opened tcp 192.168.127.3:5432 of VM db",
            "tcp 192.168.127.3:5432 of VM db of web finished"
        ]
    );
    let explain = |vm: &str, target: &str| rig.hub.explain(vm, &target.parse().unwrap()).unwrap();
    let allowed = explain("web", "tcp 192.168.127.3:5432");
    assert_eq!((allowed.action, allowed.peer_vm.as_str()), (ALLOW, "db"));
    assert_eq!(allowed.guards, [v1::Guard::Guest as i32]);
    let denied = explain("web", "icmp 192.168.127.3");
    assert_eq!(denied.action, DENY);
    assert!(denied.reason.unwrap().text.contains("the address of VM db"));
    let nobody = explain("web", "tcp 192.168.127.77:80");
    assert_eq!((nobody.action, nobody.peer_vm.as_str()), (DENY, ""));
    let own = explain("db", "tcp 192.168.127.3:80");
    assert_eq!((own.action, own.peer_vm.as_str()), (DENY, ""));
}

#[test]
fn that_an_address_is_synthetic_is_told_as_no_guard() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let under = |guards| match flow("198.18.0.9:80", &["a.example.com"]) {
        Subject::Flow(flow) => Subject::Flow(FlowSubject { guards, ..flow }),
        lookup => lookup,
    };
    let synthetic = GuardSet::EMPTY.with(Guard::Synthetic);
    let (_, id) = dp.held(under(synthetic));
    let asked = rig.hub.pending_request(&id).unwrap();
    assert_eq!(asked.guards, [0; 0]);
    assert_eq!(asked.scopes[0], v1::Scope::NamePort as i32);
    let (_, id) = dp.held(under(GuardSet::EMPTY.with(Guard::PrivateFromDns)));
    let asked = rig.hub.pending_request(&id).unwrap();
    assert_eq!(
        asked.guards,
        [v1::Guard::PrivateFromDns as i32],
        "others are told"
    );
}
