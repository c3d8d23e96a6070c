mod apart;
mod claims;
mod closed;
mod confirm;
mod forwards;
mod guests;
mod history;
mod host;
mod names;
mod networks;
mod reach;
mod returns;
mod settings;
mod verify;
mod zones;

use std::time::Duration;

use vnet_proto::model::{Budget, Epoch, MissId, Mode, Subject, Target, VmSelector};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Told;

use super::*;
use crate::approval::Answer;
use crate::grant::{GrantAction, Lifetime};
use crate::store::{EventQuery, Location};
use crate::testing::{FakeDataplane, Rig, TempDir, alias, cuts, flow, hello, lookup, verdicts, vm_up};
use crate::watch::Next;

const ALLOW: i32 = v1::Action::Allow as i32;
const DENY: i32 = v1::Action::Deny as i32;
const WEB: &str = "192.0.2.7:443";

pub(super) fn reply(id: &str, answer: Answer) -> Reply<'_> {
    Reply {
        id,
        etag: "",
        answer,
        scope: None,
        lifetime: None,
        vms: None,
        budget: Budget::default(),
        reason: "",
        lookup_only: false,
        actor: "tester",
    }
}

pub(super) fn grant<'a>(
    action: GrantAction,
    target: &str,
    vm: Option<&str>,
    lifetime: Lifetime,
) -> NewGrant<'a> {
    NewGrant {
        action,
        target: target.parse::<Target>().unwrap(),
        vms: vm.map(VmSelector::named),
        lifetime,
        budget: Budget::default(),
        reason: "",
        request_id: "",
        actor: "tester",
    }
}

fn set_mode<'a>(name: &'a str, mode: Mode) -> VmUpdate<'a> {
    VmUpdate {
        name,
        mode: Some(mode),
        labels: BTreeMap::new(),
        etag: "",
        actor: "tester",
    }
}

pub(super) fn epoch_of(verdict: &v1::Verdict) -> Option<Epoch> {
    verdict.epoch.map(|e| e.try_into().unwrap())
}

/// Opens an allowed flow, as a dataplane does.
fn open_allowed(dataplane: &mut FakeDataplane, destination: &str) -> u64 {
    let verdict = dataplane.verdict(flow(destination, &[]));
    assert_eq!(verdict.action, ALLOW, "{verdict:?}");
    dataplane.open(&flow(destination, &[]), epoch_of(&verdict), &verdict.grant_id)
}

#[test]
fn without_policy_or_mode_a_miss_is_allowed_under_the_epoch_in_force() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let verdict = dp.verdict(flow(WEB, &[]));
    assert_eq!(verdict.action, ALLOW);
    assert!(verdict.epoch.is_some() && !verdict.once);
    assert_eq!(rig.hub.vm("web").unwrap().mode, v1::Mode::Open as i32);
}

#[test]
fn an_undecided_miss_is_held_and_a_yes_lets_it_through() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (miss, id) = dp.held(flow(WEB, &[]));
    let open = rig.hub.pending(Which::default());
    assert_eq!(open.len(), 1);
    assert_eq!(
        (open[0].id.as_str(), open[0].vm.as_str(), open[0].held),
        (id.as_str(), "web", 1)
    );

    let (request, grant, ..) = rig.hub.reply(&reply(&id[..4], Answer::Approve)).unwrap();
    assert_eq!(request.state, v1::PendingState::Approved as i32);
    assert_eq!(grant.creator, "tester");
    let told = dp.told();
    // The revocation comes before the verdict, so that the verdict is not dropped with the old ones.
    let revoke = told.iter().position(|t| matches!(t, Told::Revoke(_))).unwrap();
    let verdict = told.iter().position(|t| matches!(t, Told::Verdict(_))).unwrap();
    assert!(revoke < verdict);
    let verdict = &verdicts(&told)[0];
    assert_eq!((verdict.miss_id, verdict.action), (miss.0, ALLOW));
    assert_eq!(verdict.grant_id, grant.id);
    assert_eq!(rig.hub.pending(Which::default()).len(), 0);
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW, "the grant holds");
    assert_eq!(rig.hub.grants("web", "").unwrap()[0].hits, 2);
}

#[test]
fn a_no_refuses_at_once_and_stays() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (miss, id) = dp.held(flow(WEB, &[]));
    rig.hub.reply(&reply(&id, Answer::Deny)).unwrap();
    let told = verdicts(&dp.told());
    assert_eq!((told[0].miss_id, told[0].action), (miss.0, DENY));
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
}

#[test]
fn two_clients_answer_and_exactly_one_has_effect() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow(WEB, &[]));
    let shown = rig.hub.pending_request(&id).unwrap().etag;
    let mut first = reply(&id, Answer::Approve);
    first.etag = &shown;
    let mut second = reply(&id, Answer::Deny);
    second.etag = &shown;
    rig.hub.reply(&first).unwrap();
    assert!(rig.hub.reply(&second).is_err());
    assert_eq!(rig.hub.grants("", "").unwrap().len(), 1, "the loser left nothing");
    assert_eq!(verdicts(&dp.told()).len(), 1);
    let mut stale = reply(&id, Answer::Approve);
    stale.etag = "0000";
    assert!(rig.hub.reply(&stale).is_err());
}

#[test]
fn the_same_question_is_asked_once_and_both_families_of_a_lookup_join() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, first) = dp.held(flow(WEB, &[]));
    let (_, again) = dp.held(flow(WEB, &[]));
    assert_eq!(first, again);
    let (a, pair) = dp.held(lookup("example.com", 1));
    let (aaaa, same) = dp.held(lookup("example.com", 28));
    assert_eq!(pair, same);
    assert_eq!(rig.hub.pending(Which::default()).len(), 2);

    rig.hub.reply(&reply(&pair, Answer::Approve)).unwrap();
    let answered: Vec<u64> = verdicts(&dp.told()).iter().map(|v| v.miss_id).collect();
    assert_eq!(answered, [a.0, aaaa.0]);
    // One intent, one question: the connection to what the lookup taught needs no second yes.
    assert_eq!(
        dp.verdict(flow("198.51.100.9:80", &["example.com"])).action,
        ALLOW
    );
}

#[test]
fn a_late_yes_serves_the_next_attempt() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (miss, id) = dp.held(flow(WEB, &[]));
    rig.pass(Duration::from_secs(30));
    dp.say(Message::MissEnded(v1::MissEnded {
        miss_id: miss.0,
        end: v1::MissEnd::HoldExpired.into(),
    }));
    assert_eq!(
        rig.hub.pending(Which::default()).len(),
        1,
        "the question outlives the packet"
    );
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    assert_eq!(verdicts(&dp.told()), []);
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
}

#[test]
fn a_guest_that_gives_up_cancels_and_a_request_ends_after_its_life() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (miss, id) = dp.held(flow(WEB, &[]));
    dp.say(Message::MissEnded(v1::MissEnded {
        miss_id: miss.0,
        end: v1::MissEnd::GuestGaveUp.into(),
    }));
    assert_eq!(
        rig.hub.pending_request(&id).unwrap().state,
        v1::PendingState::Cancelled as i32
    );
    let (_, id) = dp.held(flow(WEB, &[]));
    rig.pass(Duration::from_secs(601));
    assert_eq!(
        rig.hub.pending_request(&id).unwrap().state,
        v1::PendingState::Expired as i32
    );
}

#[test]
fn a_grant_for_once_lets_one_flow_through_and_keeps_it() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (_, id) = dp.held(flow(WEB, &[]));
    let once = Reply {
        lifetime: Some(Lifetime::Once),
        ..reply(&id, Answer::Approve)
    };
    rig.hub.reply(&once).unwrap();
    let verdict = verdicts(&dp.told()).remove(0);
    assert!(verdict.once);
    dp.open(&flow(WEB, &[]), epoch_of(&verdict), &verdict.grant_id);
    dp.held(flow(WEB, &[]));
    assert_eq!(rig.hub.grants("", "").unwrap().len(), 0);
    // A later change does not cut the flow for want of the spent grant; an explicit no does.
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.8:1",
            Some("web"),
            Lifetime::Forever,
        ))
        .unwrap();
    assert!(cuts(&dp.told()).is_empty());
    rig.hub
        .create_grant(grant(
            GrantAction::Deny,
            "tcp 192.0.2.7:443",
            Some("web"),
            Lifetime::Forever,
        ))
        .unwrap();
    assert_eq!(cuts(&dp.told()), [1]);
}

#[test]
fn an_unused_grant_for_once_is_void_after_a_minute() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.7:443",
            None,
            Lifetime::Once,
        ))
        .unwrap();
    rig.pass(Duration::from_secs(61));
    assert_eq!(rig.hub.grants("", "").unwrap().len(), 0);
    dp.told();
    dp.held(flow(WEB, &[]));
}

#[tokio::test]
async fn revoking_a_grant_cuts_its_flows_and_says_how_many() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (made, _, _, _) = rig
        .hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.0/24",
            None,
            Lifetime::Forever,
        ))
        .unwrap();
    dp.told();
    let flows = [open_allowed(&mut dp, WEB), open_allowed(&mut dp, "192.0.2.8:80")];
    let (_, ticket, _) = rig.hub.revoke_grant(&made.id[..4], "tester").unwrap();
    let told = dp.told();
    assert_eq!(cuts(&told), flows);
    dp.acknowledge(&told);
    let report = rig.hub.report(ticket).await;
    assert_eq!((report.flows, report.dataplanes_acknowledged), (2, 1));
    assert_eq!(report.dataplanes_silent, Vec::<String>::new());
    dp.held(flow(WEB, &[]));
}

#[test]
fn a_grants_expiry_cuts_new_and_live_flows() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let hour = Lifetime::For(Duration::from_secs(3600));
    rig.hub
        .create_grant(grant(GrantAction::Allow, "tcp 192.0.2.7:443", None, hour))
        .unwrap();
    let flow_id = open_allowed(&mut dp, WEB);
    dp.told();
    rig.pass(Duration::from_secs(3599));
    assert!(cuts(&dp.told()).is_empty());
    rig.pass(Duration::from_secs(1));
    assert_eq!(cuts(&dp.told()), [flow_id]);
    dp.held(flow(WEB, &[]));
}

#[tokio::test]
async fn applying_a_policy_revokes_cuts_and_decides_what_is_open() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let kept = open_allowed(&mut dp, "192.0.2.7:80");
    let lost = open_allowed(&mut dp, "192.0.2.7:22");
    assert_ne!(kept, lost);
    let applied = rig.apply("defaultAction: deny\nrules:\n  - {action: allow, ports: [80], protocol: tcp}\n");
    assert_eq!(applied.policy.revision, 1);
    let told = dp.told();
    assert_eq!(cuts(&told), [lost]);
    dp.acknowledge(&told);
    let report = rig.hub.report(applied.ticket.unwrap()).await;
    assert_eq!((report.flows, report.dataplanes_acknowledged), (1, 1));
    assert_eq!(dp.verdict(flow("192.0.2.9:80", &[])).action, ALLOW);
    assert_eq!(dp.verdict(flow("192.0.2.9:22", &[])).action, DENY);
    let vm = rig.hub.vm("web").unwrap();
    assert_eq!((vm.policy.as_str(), vm.revision), ("default", 1));
}

#[test]
fn a_policy_decides_open_requests() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (miss, id) = dp.held(flow(WEB, &[]));
    rig.apply("rules:\n  - {action: deny, cidr: 192.0.2.0/24}\n");
    assert_eq!(
        rig.hub.pending_request(&id).unwrap().state,
        v1::PendingState::Decided as i32
    );
    let verdicts = verdicts(&dp.told());
    assert_eq!((verdicts[0].miss_id, verdicts[0].action), (miss.0, DENY));
}

#[test]
fn a_wrong_policy_changes_nothing_and_an_old_etag_is_refused() {
    let rig = Rig::open();
    rig.apply("defaultAction: deny\n");
    assert!(rig.try_apply("defaultAction: Deny\nruels: []\n").is_err());
    let policy = rig.hub.policy("").unwrap();
    assert_eq!(policy.revision, 1);
    let stale = Candidate {
        name: "",
        document: "defaultAction: allow\n",
        source: "",
        etag: "not it",
        actor: "x",
        validate_only: false,
        lists: &[],
        confirm_within: None,
    };
    assert!(matches!(rig.hub.apply_policy(stale), Err(Refusal::Changed(_))));
    let checked = Candidate {
        etag: &policy.etag,
        validate_only: true,
        ..stale
    };
    assert_eq!(rig.hub.apply_policy(checked).unwrap().policy.revision, 2);
    assert_eq!(rig.hub.policy("").unwrap().revision, 1, "only checked");
}

#[tokio::test]
async fn a_flow_that_an_older_epoch_let_through_is_judged_anew() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let verdict = dp.verdict(flow("192.0.2.7:22", &[]));
    let applied = rig.apply("defaultAction: deny\n");
    let told = dp.told();
    assert!(cuts(&told).is_empty());
    // It opened before the Revoke arrived, and is reported before the acknowledgement.
    let late = dp.open(&flow("192.0.2.7:22", &[]), epoch_of(&verdict), "");
    let cut = dp.told();
    assert_eq!(cuts(&cut), [late]);
    dp.acknowledge(&told);
    dp.acknowledge(&cut);
    assert_eq!(rig.hub.report(applied.ticket.unwrap()).await.flows, 1);
}

#[tokio::test]
async fn a_dataplane_that_does_not_acknowledge_is_named() {
    let rig = Rig::open();
    let one = rig.dataplane("web");
    let applied = rig.apply("defaultAction: deny\n");
    one.lose();
    let report = rig.hub.report(applied.ticket.unwrap()).await;
    assert_eq!(
        (report.dataplanes_acknowledged, report.dataplanes_silent),
        (0, vec!["dp1".to_owned()])
    );

    rig.dataplane_with(hello(2, vec![vm_up(1, "other")])).lose();
    let applied = rig.apply("defaultAction: allow\n");
    let report = rig.hub.report(applied.ticket.unwrap()).await;
    assert_eq!(report.dataplanes_silent, ["dp1", "dp2"]);
}

#[test]
fn only_the_dataplanes_concerned_are_revoked() {
    let rig = Rig::secure();
    let mut one = rig.dataplane_with(hello(1, vec![vm_up(1, "a")]));
    let mut two = rig.dataplane_with(hello(2, vec![vm_up(1, "b")]));
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.7:443",
            Some("a"),
            Lifetime::Forever,
        ))
        .unwrap();
    assert!(one.told().iter().any(|t| matches!(t, Told::Revoke(_))));
    assert!(two.told().is_empty());
}

#[tokio::test]
async fn modes_take_effect_and_quarantine_sticks_to_the_name() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let flow_id = open_allowed(&mut dp, WEB);
    rig.hub.update_vm(set_mode("web", Mode::Quarantine)).unwrap();
    let told = dp.told();
    assert_eq!(cuts(&told), [flow_id]);
    assert!(
        told.iter()
            .any(|t| matches!(t, Told::VmSettings(s) if s.forwards_closed))
    );
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
    dp.say(Message::VmDown(v1::VmDown {
        vm: 1,
        ..Default::default()
    }));
    assert!(rig.hub.vms(Which::default()).is_empty());
    dp.say(Message::VmUp(vm_up(2, "web")));
    assert_eq!(rig.hub.vm("web").unwrap().mode, v1::Mode::Quarantine as i32);
    // Any other mode was set for one attachment.
    rig.hub.update_vm(set_mode("web", Mode::Block)).unwrap();
    dp.say(Message::VmDown(v1::VmDown {
        vm: 2,
        ..Default::default()
    }));
    dp.say(Message::VmUp(vm_up(3, "web")));
    assert_eq!(rig.hub.vm("web").unwrap().mode, v1::Mode::Open as i32);
}

#[test]
fn a_taken_name_gets_a_number_and_a_bad_one_is_refused() {
    let rig = Rig::open();
    let dp = rig.dataplane_with(hello(1, vec![vm_up(1, "web"), vm_up(2, "web")]));
    dp.say(Message::VmUp(vm_up(3, "web")));
    let named = [("web", ""), ("web-2", "web"), ("web-3", "web")];
    let named = named.map(|(name, wanted)| (name.to_owned(), wanted.to_owned()));
    let names = |rig: &Rig| -> Vec<_> {
        let vms = rig.hub.vms(Which::default()).into_iter();
        vms.map(|vm| (vm.name, vm.wanted_name)).collect()
    };
    assert_eq!(names(&rig), named);
    // They come again, and say what they were given.
    let again = || hello(1, vec![vm_up(3, "web-3"), vm_up(2, "web-2"), vm_up(1, "web")]);
    let dp = {
        drop(dp);
        rig.dataplane_with(again())
    };
    assert_eq!(names(&rig), named);
    let anew = Rig::open();
    let _dp = anew.dataplane_with(again());
    assert_eq!(
        names(&anew).into_iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["web", "web-2", "web-3"]
    );
    assert!(dp.try_say(Message::VmUp(vm_up(4, "a b"))).is_err());
    assert!(
        dp.try_say(Message::Hello(hello(1, vec![]))).is_err(),
        "a second hello"
    );
}

#[test]
fn a_policy_that_a_vm_brings_is_its_own_and_a_wrong_one_ends_the_session() {
    let rig = Rig::open();
    let own = |document: &str, rules: &[&str]| v1::VmUp {
        own_policy: Some(v1::OwnPolicy {
            document: document.to_owned(),
            source: "own.yaml".to_owned(),
            rules: rules.iter().map(|r| (*r).to_owned()).collect(),
            ..Default::default()
        }),
        ..vm_up(1, "web")
    };
    let mut dp = rig.dataplane_with(hello(1, vec![own("", &["allow tcp 192.0.2.7:443"])]));
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(dp.verdict(flow("192.0.2.8:443", &[])).action, DENY);
    assert_eq!(rig.hub.vm("web").unwrap().policy, "own");
    let refused = rig
        .hub
        .attach(hello(2, vec![own("rulse: []", &[])]), "")
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("own.yaml"), "{}", refused.message());

    for nothing in ["", "# defaultAction: deny"] {
        let refused = rig.hub.attach(hello(2, vec![own(nothing, &[])]), "").unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{nothing:?}");
    }
    let refused = rig.hub.attach(hello(2, vec![own("", &[])]), "").unwrap_err();
    assert!(
        refused.message().contains("neither a document nor rules"),
        "{}",
        refused.message()
    );
}

#[test]
fn a_reconnect_joins_what_is_open_and_keeps_names_and_grants() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.9:1",
            Some("web"),
            Lifetime::UntilVmStops,
        ))
        .unwrap();
    let (miss, id) = dp.held(flow(WEB, &[]));
    dp.lose();
    assert_eq!(rig.hub.vm("web").unwrap().state, v1::VmState::Lost as i32);
    rig.pass(Duration::from_secs(10));
    let mut dp = rig.dataplane("web");
    dp.announce(miss, 1, flow(WEB, &[]));
    let held = dp.told().into_iter().find_map(|t| {
        if let Told::Held(held) = t {
            Some(held)
        } else {
            None
        }
    });
    assert_eq!(held.unwrap().pending_id, id);
    assert_eq!(rig.hub.pending(Which::default()).len(), 1);
    assert_eq!(rig.hub.vm("web").unwrap().state, v1::VmState::Attached as i32);
    assert_eq!(rig.hub.grants("web", "").unwrap().len(), 1);
    rig.hub.reply(&reply(&id, Answer::Approve)).unwrap();
    assert_eq!(verdicts(&dp.told())[0].miss_id, miss.0);
}

#[test]
fn a_lost_dataplanes_vms_go_after_the_grace_and_until_vm_stops_with_them() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.9:1",
            None,
            Lifetime::UntilVmStops,
        ))
        .unwrap();
    dp.told();
    let (_, id) = dp.held(flow(WEB, &[]));
    dp.lose();
    rig.pass(LOST_GRACE);
    assert!(rig.hub.vms(Which::default()).is_empty());
    assert!(rig.hub.grants("", "").unwrap().is_empty());
    assert_eq!(
        rig.hub.pending_request(&id).unwrap().state,
        v1::PendingState::Cancelled as i32
    );
}

#[test]
fn nothing_is_asked_anew_for_a_vm_that_is_gone() {
    let gone: [fn(&Rig, &FakeDataplane); 4] = [
        // Its run was killed: its dataplane ends in order,
        |_, dp| {
            dp.say(Message::VmDown(v1::VmDown {
                vm: 1,
                ..Default::default()
            }))
        },
        // or with it.
        |rig, dp| {
            dp.lose();
            rig.pass(LOST_GRACE);
        },
        // Another run took its name.
        |rig, dp| {
            dp.lose();
            rig.dataplane_with(hello(2, vec![vm_up(1, "web")]));
        },
        // Its dataplane came back without it.
        |rig, dp| {
            dp.lose();
            rig.dataplane_with(hello(1, vec![]));
        },
    ];
    for (case, gone) in gone.into_iter().enumerate() {
        let rig = Rig::secure();
        let mut dp = rig.dataplane("web");
        let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
        let (_, id) = dp.held(flow(WEB, &[]));
        dp.held(lookup("example.com", 1));
        gone(&rig, &dp);
        assert_eq!(rig.hub.pending(Which::default()), [], "case {case}");
        let state = rig.hub.pending_request(&id).unwrap().state;
        assert_eq!(state, v1::PendingState::Cancelled as i32, "case {case}");
        let opened = std::iter::from_fn(|| watch.try_next())
            .filter(|next| matches!(next, Next::Change(e) if e.kind() == v1::EventKind::PendingOpened))
            .count();
        assert_eq!(opened, 2, "case {case}: none is opened again");
    }
}

#[test]
fn an_answer_for_a_lost_vm_waits_for_it_and_spends_nothing() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    let (miss, id) = dp.held(flow(WEB, &[]));
    dp.lose();
    let once = Reply {
        lifetime: Some(Lifetime::Once),
        ..reply(&id, Answer::Approve)
    };
    rig.hub.reply(&once).unwrap();
    assert_eq!(rig.hub.pending(Which::default()), []);
    assert_eq!(rig.hub.grants("", "").unwrap().len(), 1, "nobody used it yet");
    // It comes back, and says again what it holds.
    let mut dp = rig.dataplane("web");
    dp.announce(miss, 1, flow(WEB, &[]));
    let verdict = verdicts(&dp.told()).remove(0);
    assert_eq!(
        (verdict.miss_id, verdict.action, verdict.once),
        (miss.0, ALLOW, true)
    );
}

#[test]
fn a_newer_session_of_the_same_dataplane_takes_over() {
    let rig = Rig::open();
    let old = rig.dataplane("web");
    let mut new = rig.dataplane("web");
    assert!(old.try_say(Message::Heartbeat(v1::Heartbeat::default())).is_err());
    old.lose();
    assert_eq!(new.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(rig.hub.vms(Which::default()).len(), 1);
}

#[test]
fn a_name_whose_dataplane_is_lost_is_free_for_its_successor() {
    let rig = Rig::open();
    rig.dataplane_with(hello(1, vec![vm_up(1, "web")])).lose();
    let _dp = rig.dataplane_with(hello(2, vec![vm_up(1, "web")]));
    let vms = rig.hub.vms(Which::default());
    assert_eq!(vms.len(), 1);
    assert_eq!((vms[0].name.as_str(), vms[0].dataplane.as_str()), ("web", "dp2"));
}

#[test]
fn live_flows_of_a_reconnect_are_judged_under_what_is_in_force() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let verdict = dp.verdict(flow("192.0.2.7:22", &[]));
    dp.open(&flow("192.0.2.7:22", &[]), epoch_of(&verdict), "");
    dp.lose();
    rig.apply("defaultAction: deny\n");
    let vnet_proto::model::Subject::Flow(subject) = flow("192.0.2.7:22", &[]) else {
        unreachable!()
    };
    let again = v1::FlowOpened {
        flow_id: 1,
        vm: 1,
        subject: Some((&subject).into()),
        epoch: verdict.epoch,
        ..Default::default()
    };
    let again = v1::Hello {
        live_flows: vec![again],
        ..hello(1, vec![vm_up(1, "web")])
    };
    let attachment = rig.hub.attach(again, "").unwrap();
    let mut outbox = attachment.outbox;
    let mut told = Vec::new();
    while let Ok(response) = outbox.try_recv() {
        told.extend(response.message);
    }
    assert!(matches!(told[0], Told::Welcome(_)), "{:?}", told[0]);
    assert_eq!(cuts(&told), [1]);
    assert_eq!(rig.hub.vm("web").unwrap().live_flows, 1);
}

#[tokio::test]
async fn a_flow_that_is_announced_anew_is_told_as_such_and_is_no_other_in_the_history() {
    let rig = Rig::open();
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let vnet_proto::model::Subject::Flow(subject) = flow("192.0.2.7:22", &[]) else {
        unreachable!()
    };
    let live = v1::FlowOpened {
        flow_id: 1,
        vm: 1,
        subject: Some((&subject).into()),
        ..Default::default()
    };
    let mut dp = rig.dataplane_with(v1::Hello {
        live_flows: vec![live],
        ..hello(1, vec![vm_up(1, "web")])
    });
    dp.open(&flow("192.0.2.8:22", &[]), None, "");
    let opened: Vec<(bool, String)> = std::iter::from_fn(|| watch.try_next())
        .filter_map(|next| match next {
            Next::Change(event) if event.kind() == v1::EventKind::FlowOpened => {
                Some((event.announced, event.text))
            }
            _ => None,
        })
        .collect();
    assert_eq!(
        opened,
        [
            (true, "web still has open tcp 192.0.2.7:22".to_owned()),
            (false, "web opened tcp 192.0.2.8:22".to_owned())
        ]
    );
    let mut recalled = 0;
    let span = Span::default();
    rig.hub.recall(None, span, |_| recalled += 1).await.unwrap();
    assert_eq!(recalled, 1);
}

#[test]
fn what_a_cached_verdict_refused_is_told_of_its_own_target() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    rig.apply("mode: enforce\ndefaultAction: deny\ndns: {defaultAction: deny}\n");
    let refused = dp.verdict(flow("192.0.2.8:22", &[]));
    let name = dp.verdict(lookup("one.test", 1));
    for (verdict, subject) in [
        (&refused, flow("192.0.2.9:23", &[])),
        (&name, lookup("two.test", 28)),
    ] {
        let subject = match &subject {
            Subject::Flow(flow) => v1::decided::Subject::Flow(flow.into()),
            Subject::Lookup(lookup) => v1::decided::Subject::Lookup(lookup.into()),
        };
        dp.say(Message::Decided(v1::Decided {
            vm: 1,
            subject: Some(subject),
            action: verdict.action,
            reason: verdict.reason.clone(),
            count: 1,
            ..Default::default()
        }));
    }
    let texts: Vec<String> = std::iter::from_fn(|| watch.try_next())
        .filter_map(|next| match next {
            Next::Change(event) if !event.names.is_empty() || event.tuple.is_some() => {
                Some(event.text.clone())
            }
            _ => None,
        })
        .collect();
    let why = "nothing allows it, and the default action of policy default denies";
    assert_eq!(
        texts,
        [
            format!("tcp 192.0.2.8:22: {why}"),
            format!("lookup of one.test (A): {why}"),
            format!("tcp 192.0.2.9:23: {why}"),
            format!("lookup of two.test (AAAA): {why}"),
        ]
    );
}

#[test]
fn dataplanes_of_one_name_and_network_are_told_apart() {
    let rig = Rig::open();
    let _first = rig.dataplane("a");
    let second = v1::Hello {
        dataplane: "dp1".to_owned(),
        network: "net1".to_owned(),
        ..hello(2, vec![vm_up(1, "b")])
    };
    let _second = rig.dataplane_with(second);
    let networks = ["net1", "net1-2"].map(|name| {
        rig.hub
            .read(|state, _| state.fleet.dataplane_of_network(name).is_ok())
    });
    assert_eq!(networks, [true, true]);
}

#[tokio::test]
async fn grants_policies_and_sequence_survive_a_restart() {
    let dir = TempDir::new();
    let location = Location::Sqlite(dir.path().join("s.db"));
    let last = {
        let rig = Rig::start(&location, true);
        let mut dp = rig.dataplane("web");
        let applied = rig.apply("defaultAction: deny\nmode: ask\n");
        applied.durable.wait().await.unwrap();
        let (allow, deny) = (GrantAction::Allow, GrantAction::Deny);
        for (action, to, lifetime) in [
            (allow, "tcp 192.0.2.7:443", Lifetime::Forever),
            (allow, "tcp 192.0.2.7:443", Lifetime::UntilVmStops),
            (allow, "tcp 192.0.2.7:443", Lifetime::Once),
            (deny, "tcp 192.0.2.8:443", Lifetime::Once),
        ] {
            let made = rig.hub.create_grant(grant(action, to, None, lifetime));
            made.unwrap().3.wait().await.unwrap();
        }
        rig.hub
            .update_vm(set_mode("web", Mode::Block))
            .unwrap()
            .2
            .wait()
            .await
            .unwrap();
        dp.told();
        rig.hub.watch_events(EventFilter::default()).unwrap().1
    };
    let rig = Rig::start(&location, true);
    assert_eq!(rig.hub.watch_events(EventFilter::default()).unwrap().1, last);
    assert_eq!(rig.hub.policy("").unwrap().revision, 1);
    assert_eq!(
        rig.hub.grants("", "").unwrap().len(),
        3,
        "a yes for once is asked for again, a no is kept"
    );
    // The same attachment comes back: what was set for it holds.
    let dp = rig.dataplane("web");
    assert_eq!(rig.hub.vm("web").unwrap().mode, v1::Mode::Block as i32);
    assert_eq!(rig.hub.grants("web", "").unwrap().len(), 3);
    rig.pass(LOST_GRACE);
    let left = rig.hub.grants("web", "").unwrap().len();
    assert_eq!(left, 2, "the no for once is void in a minute, as ever");
    drop(dp);
    drop(rig);
    // It does not: what was bound to it ends.
    let rig = Rig::start(&location, true);
    let _dp = rig.dataplane_with(hello(7, vec![vm_up(1, "web")]));
    assert_eq!(rig.hub.vm("web-2").unwrap().mode, v1::Mode::Ask as i32);
    assert_eq!(rig.hub.grants("web-2", "").unwrap(), []);
    rig.pass(LOST_GRACE);
    assert_eq!(rig.hub.grants("", "").unwrap().len(), 1);
}

#[tokio::test]
async fn t63_a_history_that_was_cut_off_says_so_and_no_number_means_two_events() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let location = Location::Sqlite(file.clone());
    let all = || EventQuery {
        oldest_first: true,
        limit: 1_000,
        ..Default::default()
    };
    let last = {
        let rig = Rig::start(&location, true);
        let _dp = rig.dataplane("web");
        rig.hub.watch_events(EventFilter::default()).unwrap().1
    };
    // Closed in order: nothing is said, and the numbers go on.
    let rig = Rig::start(&location, true);
    assert_eq!(rig.hub.watch_events(EventFilter::default()).unwrap().1, last);
    drop(rig);

    // Killed: its mark is still there.
    rusqlite::Connection::open(&file)
        .unwrap()
        .execute("INSERT INTO history_opened (one) VALUES (1)", [])
        .unwrap();
    let rig = Rig::start(&location, true);
    let (_watch, given) = rig.hub.watch_events(EventFilter::default()).unwrap();
    assert!(given > last + 1_000_000_000, "{last}, then {given}");
    rig.hub.tick();
    let kept = rig.hub.writer().events(all()).await.unwrap();
    let cut = kept.iter().filter(|e| e.kind() == v1::EventKind::HistoryCutOff);
    let cut: Vec<u64> = cut.map(|event| event.sequence).collect();
    assert_eq!(cut, [given]);
    drop(rig);
    // It is told once.
    let rig = Rig::start(&location, true);
    assert_eq!(rig.hub.watch_events(EventFilter::default()).unwrap().1, given);
}

#[test]
fn a_repeated_request_id_makes_one_grant_and_a_missing_vm_is_named() {
    let rig = Rig::secure();
    let none = rig.hub.create_grant(grant(
        GrantAction::Allow,
        "tcp 192.0.2.7:443",
        None,
        Lifetime::Forever,
    ));
    assert!(none.is_err(), "no VM at all");
    let _dp = rig.dataplane_with(hello(1, vec![vm_up(1, "a"), vm_up(2, "b")]));
    let which = rig.hub.create_grant(grant(
        GrantAction::Allow,
        "tcp 192.0.2.7:443",
        None,
        Lifetime::Forever,
    ));
    assert!(which.unwrap_err().to_string().contains("a, b"));
    let new = || NewGrant {
        request_id: "r1",
        ..grant(
            GrantAction::Allow,
            "tcp 192.0.2.7:443",
            Some("a"),
            Lifetime::Forever,
        )
    };
    let first = rig.hub.create_grant(new()).unwrap().0;
    assert_eq!(rig.hub.create_grant(new()).unwrap().0, first);
    assert_eq!(rig.hub.grants("", "").unwrap().len(), 1);
}

#[test]
fn a_grant_answers_open_requests_and_a_rule_overrules_it() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    dp.held(flow("192.0.2.7:1", &[]));
    dp.held(flow("192.0.2.7:2", &[]));
    let (_, answered, _, _) = rig
        .hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.7",
            None,
            Lifetime::Forever,
        ))
        .unwrap();
    assert_eq!(answered, 2);
    rig.apply("rules:\n  - {name: no-ssh, action: deny, ports: [22], protocol: tcp}\n");
    let refused = rig
        .hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.7:22",
            None,
            Lifetime::Forever,
        ))
        .unwrap_err();
    assert!(refused.to_string().contains("no-ssh"), "{refused}");
    assert!(matches!(
        refused,
        Refusal::Precondition {
            reason: "OVERRULED",
            ..
        }
    ));
}

#[test]
fn a_slow_watcher_gets_a_gap_and_the_hub_does_not_wait() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let (mut watch, _) = rig.hub.watch_events(EventFilter::default()).unwrap();
    let misses = WATCH_QUEUE_MAX + 10;
    rig.apply("defaultAction: deny\n");
    dp.told();
    for n in 0..misses {
        let reset = v1::FlowOpened {
            flow_id: n as u64 + 1,
            vm: 1,
            subject: match flow(WEB, &[]) {
                Subject::Flow(flow) => Some((&flow).into()),
                Subject::Lookup(_) => None,
            },
            ..Default::default()
        };
        dp.say(Message::FlowOpened(reset));
        dp.told();
    }
    let mut seen = 0;
    let missed = loop {
        match watch.try_next() {
            Some(Next::Change(_)) => seen += 1,
            Some(Next::Gap(missed)) => break missed,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((seen, missed), (WATCH_QUEUE_MAX, 11), "one event is the policy's");
}

#[tokio::test]
async fn a_guest_that_is_denied_again_and_again_makes_few_events_and_hides_none() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply("defaultAction: deny\n");
    dp.told();
    let (made, ..) = rig
        .hub
        .create_grant(grant(
            GrantAction::Allow,
            "tcp 192.0.2.9:1",
            None,
            Lifetime::Forever,
        ))
        .unwrap();
    let attempts = 2 * repeats::KEYS_PER_VM_MAX;
    for n in 0..attempts {
        for _ in 0..3 {
            let to = format!("10.0.{}.{}:80", n / 256, n % 256);
            assert_eq!(dp.verdict(flow(&to, &[])).action, DENY);
        }
        dp.told();
    }
    assert_eq!(dp.verdict(lookup("example.com", 1)).action, ALLOW);
    rig.hub.bring_history_up_to_date();
    let all = crate::store::EventQuery {
        limit: 100_000,
        ..Default::default()
    };
    let events = rig.hub.writer().events(all).await.unwrap();
    let of = |kind: v1::EventKind| events.iter().filter(move |e| e.kind() == kind);
    let denied: Vec<_> = of(v1::EventKind::FlowDenied).collect();
    // Of each that has room: the first, and the two that followed; and twice for all others.
    assert_eq!(denied.len(), 2 * (repeats::KEYS_PER_VM_MAX + 1));
    let counted: u64 = denied.iter().map(|e| e.count.max(1)).sum();
    assert_eq!(counted, 3 * attempts as u64, "none is lost");
    assert_eq!(of(v1::EventKind::DnsAllowed).count(), 1);
    assert!(of(v1::EventKind::GrantCreated).any(|e| e.subject == made.id));
    let told = denied.len() as u64;
    assert_eq!(rig.metrics.events_counted.get(), 3 * attempts as u64 - told / 2);
}

#[test]
fn what_a_dataplane_counts_of_a_vm_is_shown_with_it() {
    let rig = Rig::open();
    let dp = rig.dataplane("web");
    let many = (0..10_000).map(|n| (format!("made_up_{n}"), n));
    dp.say(Message::VmStatus(v1::VmStatus {
        vm: 1,
        attached: true,
        dropped_frames: [("denied".to_owned(), 2)].into(),
        counters: [("dns_relayed".to_owned(), 5)].into(),
        ..Default::default()
    }));
    let vm = rig.hub.vm("web").unwrap();
    assert_eq!((vm.dropped_frames["denied"], vm.counters["dns_relayed"]), (2, 5));
    dp.say(Message::VmStatus(v1::VmStatus {
        vm: 1,
        attached: true,
        counters: many.collect(),
        ..Default::default()
    }));
    assert_eq!(rig.hub.vm("web").unwrap().counters.len(), 256, "no more are kept");
}

#[tokio::test]
async fn limits_that_a_vm_met_are_in_the_history_once_a_minute_with_their_count() {
    let rig = Rig::open();
    let dp = rig.dataplane("web");
    for refused in [1, 4, 40] {
        dp.say(Message::VmStatus(v1::VmStatus {
            vm: 1,
            attached: true,
            dropped_frames: [("flow_limit".to_owned(), refused), ("denied".to_owned(), 7)].into(),
            counters: [
                ("synthetic_exhausted".to_owned(), refused),
                ("dns_relayed".to_owned(), 7),
            ]
            .into(),
            ..Default::default()
        }));
    }
    rig.hub.bring_history_up_to_date();
    let all = crate::store::EventQuery {
        limit: 1_000,
        ..Default::default()
    };
    let events = rig.hub.writer().events(all).await.unwrap();
    let reached: Vec<_> = events
        .iter()
        .filter(|e| e.kind() == v1::EventKind::LimitReached)
        .map(|e| (e.vm.as_str(), e.text.contains("synthetic"), e.count))
        .collect();
    // Newest first: the 39 that followed in one, the first at once. Of either count.
    for synthetic in [false, true] {
        let of: Vec<u64> = reached
            .iter()
            .filter(|(vm, is, _)| *vm == "web" && *is == synthetic)
            .map(|(_, _, count)| *count)
            .collect();
        assert_eq!(of, [39, 0], "{reached:?}");
    }
    assert_eq!(reached.len(), 4);
}

#[test]
fn watches_begin_with_what_is_there() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    dp.held(flow(WEB, &[]));
    let mut watch = rig.hub.watch_pending(None).unwrap();
    let mut next = || match watch.try_next() {
        Some(Next::Change(change)) => change.change,
        other => panic!("{other:?}"),
    };
    assert_eq!(next(), v1::PendingChange::Added as i32);
    assert_eq!(next(), v1::PendingChange::Synced as i32);
    dp.held(flow("192.0.2.7:1", &[]));
    assert_eq!(next(), v1::PendingChange::Added as i32);
    let other = rig
        .hub
        .watch_pending(Some(VmSelector::named("other")))
        .unwrap()
        .try_next();
    assert!(matches!(other, Some(Next::Change(c)) if c.change == v1::PendingChange::Synced as i32));
}

#[test]
fn malformed_and_stray_messages_are_counted_and_change_nothing() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    dp.say(Message::Miss(v1::Miss::default()));
    dp.announce(MissId(9), 77, flow(WEB, &[]));
    dp.say(Message::FlowClosed(v1::FlowClosed {
        flow_id: 9,
        ..Default::default()
    }));
    assert_eq!(dp.told(), []);
    assert_eq!((rig.metrics.malformed.get(), rig.metrics.stray.get()), (1, 2));
    // A flow that cannot be read cannot be judged.
    dp.say(Message::FlowOpened(v1::FlowOpened {
        flow_id: 5,
        vm: 1,
        ..Default::default()
    }));
    assert_eq!(cuts(&dp.told()), [5]);
}

#[test]
fn bindings_explain_and_denied_lookups_are_listed() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply("defaultAction: deny\ndns:\n  allowedDomains: [good.test]\n");
    dp.told();
    dp.say(Message::Binding(v1::BindingLearned {
        vm: 1,
        name: "good.test".to_owned(),
        addresses: vec![vec![192, 0, 2, 7]],
        expires_in: Some(prost_types::Duration {
            seconds: 60,
            nanos: 0,
        }),
    }));
    let explained = rig
        .hub
        .explain("", &"tcp 192.0.2.7:443".parse().unwrap())
        .unwrap();
    assert_eq!(
        (explained.action, explained.names),
        (ALLOW, vec!["good.test".to_owned()])
    );
    let metadata = rig
        .hub
        .explain("web", &"tcp 169.254.169.254:80".parse().unwrap())
        .unwrap();
    assert_eq!(
        (metadata.action, metadata.guards),
        (DENY, vec![v1::Guard::Metadata as i32])
    );
    assert!(
        rig.hub
            .explain("web", &"tcp 10.0.0.0/8:80".parse().unwrap())
            .is_err()
    );
    assert_eq!(dp.verdict(lookup("bad.test", 1)).action, DENY);
    assert_eq!(dp.verdict(lookup("bad.test", 1)).action, DENY);
    let denied = rig.hub.denied(Which::default());
    assert_eq!(
        (denied.len(), denied[0].name.as_str(), denied[0].count),
        (1, "bad.test", 2)
    );
    assert_eq!(rig.hub.bindings(Which::default()).len(), 1);
    rig.pass(Duration::from_secs(60));
    assert_eq!(rig.hub.bindings(Which::default()).len(), 0);
}

#[test]
fn a_dataplane_that_reads_too_slowly_is_ended() {
    let rig = Rig::secure();
    let mut dp = rig.dataplane("web");
    rig.hub
        .create_grant(grant(
            GrantAction::Deny,
            "tcp 192.0.2.7:443",
            None,
            Lifetime::Forever,
        ))
        .unwrap();
    for n in 0..=attach::OUTBOX_MAX as u64 {
        dp.announce(MissId(n), 1, flow(WEB, &[]));
    }
    assert!(
        dp.ended()
            .is_some_and(|status| status.code() == tonic::Code::ResourceExhausted)
    );
}

#[tokio::test]
async fn commands_are_acknowledged_or_refused_by_the_dataplane() {
    let rig = Rig::open();
    let forward = |network: &str| v1::Forward {
        network: network.to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: "127.0.0.1:0".to_owned(),
        target: "192.168.127.2:80".to_owned(),
        ..Default::default()
    };
    let expose = |network: &str| v1::command::Command::Expose(forward(network));
    assert!(matches!(
        rig.hub.command("", expose).await,
        Err(Refusal::Unavailable(_))
    ));
    let mut dp = rig.dataplane("web");
    let hub = std::sync::Arc::clone(&rig.hub);
    let call = tokio::spawn(async move {
        hub.command("", |n| v1::command::Command::Expose(forward(n)))
            .await
    });
    let id = loop {
        tokio::task::yield_now().await;
        if let Some(Told::Command(command)) = dp.told().pop() {
            break command.command_id;
        }
    };
    let opened = v1::Forward {
        listen: "127.0.0.1:4711".to_owned(),
        ..forward("net1")
    };
    dp.say(Message::Ack(v1::Ack {
        command_id: id,
        forward: Some(opened.clone()),
        ..Default::default()
    }));
    assert_eq!(call.await.unwrap().unwrap().forward, Some(opened.clone()));
    for network in ["", "net1"] {
        let listed = rig.hub.forwards(network).unwrap();
        assert_eq!(listed, std::slice::from_ref(&opened));
    }

    // While it is cut off it is not a network without forwards, of which another may be told that it is closed. That its
    // zones are refused, and listed as soon as it is connected, is also how gvproxy knows when it is `ready`
    // (`has_session` in vnetctl's `cmd/attend.rs`); the details are how it tells this from a broken connection.
    dp.lose();
    let asked = rig.hub.forwards("net1").unwrap_err();
    assert!(matches!(asked, Refusal::Unavailable(_)), "{asked:?}");
    assert!(rig.hub.zones("").unwrap().is_empty());
    let asked = rig.hub.zones("net1").unwrap_err();
    assert!(matches!(asked, Refusal::Unavailable(_)), "{asked:?}");
    assert!(!tonic::Status::from(asked).details().is_empty());
    assert!(rig.hub.forwards("").unwrap().is_empty());
}

#[tokio::test]
async fn ranges_of_forwards_come_and_go_whole() {
    use v1::command::Command;
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let forward = |port: u16| v1::Forward {
        network: "net1".to_owned(),
        protocol: v1::Protocol::Tcp.into(),
        listen: format!("127.0.0.1:{port}"),
        target: format!("192.168.127.2:{}", port - 8000),
        ..Default::default()
    };
    let range = |first: u16, count| v1::ForwardRange {
        first: Some(forward(first)),
        count,
    };
    let answers = [
        (
            Command::ExposeRange(range(8000, 3)),
            vec![forward(8000), forward(8001), forward(8002)],
        ),
        (
            Command::UnexposeRange(range(8001, 2)),
            vec![forward(8001), forward(8002)],
        ),
    ];
    let left = [3, 1];
    for ((command, forwards), left) in answers.into_iter().zip(left) {
        let hub = std::sync::Arc::clone(&rig.hub);
        let call = tokio::spawn(async move { hub.command("", |_| command).await });
        let command_id = loop {
            tokio::task::yield_now().await;
            if let Some(Told::Command(command)) = dp.told().pop() {
                break command.command_id;
            }
        };
        let ack = v1::Ack {
            command_id,
            forwards: forwards.clone(),
            ..Default::default()
        };
        dp.say(Message::Ack(ack));
        assert_eq!(call.await.unwrap().unwrap().forwards, forwards);
        assert_eq!(rig.hub.forwards("").unwrap().len(), left);
    }
    assert_eq!(rig.hub.forwards("").unwrap(), [forward(8000)]);
}

const LISTED: &str = "version: 1\nsets:\n  web: {file: lists/web.txt}\nrules:\n  - {action: allow, cidrs: \"@web\", ports: [443]}\n";

fn listed<'a>(lists: &'a [v1::PolicyList]) -> Candidate<'a> {
    Candidate {
        name: "",
        document: LISTED,
        source: "p.yaml",
        etag: "",
        actor: "x",
        validate_only: false,
        lists,
        confirm_within: None,
    }
}

#[test]
fn a_rules_end_cuts_its_live_flows_and_its_verdicts_say_when() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let end = rig.hub.now().wall + Duration::from_secs(10);
    let until = humantime::format_rfc3339_micros(end);
    rig.apply(&format!(
        "version: 1\nrules:\n  - {{action: allow, cidr: 192.0.2.0/24, until: {until}}}\n"
    ));
    let verdict = dp.verdict(flow(WEB, &[]));
    let expires_in = Duration::try_from(verdict.expires_in.unwrap()).unwrap();
    assert!(
        expires_in > Duration::from_millis(9_990) && expires_in <= Duration::from_secs(10),
        "{expires_in:?}"
    );
    let flow_id = open_allowed(&mut dp, WEB);
    dp.told();
    rig.pass(Duration::from_secs(9));
    assert!(cuts(&dp.told()).is_empty());
    rig.pass(Duration::from_secs(1));
    let told = dp.told();
    assert_eq!(cuts(&told), [flow_id]);
    assert!(
        told.iter().any(|message| matches!(message, Told::Revoke(_))),
        "cached verdicts are void"
    );
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
}

#[test]
fn a_verdict_that_rests_on_a_name_says_so_to_the_dataplane() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply("version: 1\nrules:\n  - {action: allow, domains: [a.test], ports: [443]}\n");
    let verdict = dp.verdict(flow(WEB, &["a.test", "b.test"]));
    assert_eq!(verdict.name_demand, v1::NameDemand::ByPort as i32);
    assert_eq!(verdict.names, ["a.test"]);
}

#[test]
fn a_policy_whose_own_tests_fail_changes_nothing() {
    let rig = Rig::open();
    rig.apply("defaultAction: deny\n");
    let wrong = "version: 1\ndefaultAction: allow\ntests:\n  - deny: \"tcp 192.0.2.7:443\"\n";
    let told = rig.try_apply(wrong).unwrap_err().to_string();
    assert!(
        told.starts_with("p.yaml:4:11: tests[0]: \"tcp 192.0.2.7:443\" is allow for test (expected deny)"),
        "{told}"
    );
    assert_eq!(rig.hub.policy("").unwrap().revision, 1);
}

#[test]
fn a_policy_is_applied_with_its_lists_and_shown_without_their_content() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    assert!(matches!(
        rig.hub.apply_policy(listed(&[])),
        Err(Refusal::Document(_))
    ));
    let lists = [crate::lists::pack("lists/web.txt", b"192.0.2.0/24\n")];
    rig.hub.apply_policy(listed(&lists)).unwrap();
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    let shown = rig.hub.policy("").unwrap();
    assert_eq!((shown.lists[0].sha256.len(), shown.lists[0].size_bytes), (64, 13));
    assert!(shown.lists[0].content.is_empty());
    let etag = shown.etag;

    let other = [crate::lists::pack("lists/web.txt", b"198.51.100.0/24\n")];
    rig.hub.apply_policy(listed(&other)).unwrap();
    assert_ne!(
        rig.hub.policy("").unwrap().etag,
        etag,
        "another list is another policy"
    );
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
}

#[tokio::test]
async fn lists_survive_a_restart_and_are_there_for_a_rollback() {
    let dir = TempDir::new();
    let location = Location::Sqlite(dir.path().join("state.db"));
    {
        let rig = Rig::start(&location, false);
        for content in ["192.0.2.0/24\n", "198.51.100.0/24\n", "192.0.2.0/24\n"] {
            let lists = [crate::lists::pack("lists/web.txt", content.as_bytes())];
            rig.hub
                .apply_policy(listed(&lists))
                .unwrap()
                .durable
                .wait()
                .await
                .unwrap();
        }
    }
    let rig = Rig::start(&location, false);
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    let earlier = rig
        .hub
        .writer()
        .policy("default".into(), 2)
        .await
        .unwrap()
        .unwrap();
    rig.hub.apply_policy(listed(&earlier.lists)).unwrap();
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
}

#[test]
fn vms_that_bring_the_same_policy_share_it_and_its_lists_come_once() {
    let rig = Rig::open();
    let own = |handle: u32, name: &str, list: v1::PolicyList| v1::VmUp {
        own_policy: Some(v1::OwnPolicy {
            document: LISTED.to_owned(),
            source: "own.yaml".to_owned(),
            lists: vec![list],
            ..Default::default()
        }),
        ..vm_up(handle, name)
    };
    let list = crate::lists::pack("lists/web.txt", b"192.0.2.0/24\n");
    let bare = crate::lists::described(std::slice::from_ref(&list)).remove(0);
    let mut dp = rig.dataplane_with(hello(
        1,
        vec![own(1, "a", list.clone()), own(2, "b", bare.clone())],
    ));
    dp.told();
    for vm in [1, 2] {
        dp.announce(MissId(100 + u64::from(vm)), vm, flow(WEB, &[]));
        assert_eq!(verdicts(&dp.told())[0].action, ALLOW, "VM {vm}");
    }
    // On its own, a list without its content is refused.
    assert!(dp.try_say(Message::VmUp(own(3, "c", bare))).is_err());
    assert!(dp.try_say(Message::VmUp(own(3, "c", list))).is_ok());
}
