//! Policies and modes come into force, of everybody and of one VM, with their lists.

use super::*;

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
fn what_a_vm_may_come_to_be_under_is_known_while_none_is_there() {
    assert!(Rig::secure().hub.is_any_in_force());
    let rig = Rig::open();
    assert!(!rig.hub.is_any_in_force());
    let dp = rig.dataplane("web");
    rig.hub.update_vm(set_mode("web", Mode::Quarantine)).unwrap();
    let gone = |vm| {
        Message::VmDown(v1::VmDown {
            vm,
            ..Default::default()
        })
    };
    dp.say(gone(1));
    assert!(rig.hub.is_any_in_force(), "its name is in quarantine still");
    dp.say(Message::VmUp(vm_up(2, "web")));
    rig.hub.update_vm(set_mode("web", Mode::Block)).unwrap();
    dp.say(gone(2));
    assert!(!rig.hub.is_any_in_force());
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
