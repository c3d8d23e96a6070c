//! What a miss is answered, asked about, and what an answer does.

use super::*;

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
