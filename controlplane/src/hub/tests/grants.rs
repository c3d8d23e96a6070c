//! Grants: for once, for a time, taken back, kept.

use super::*;

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
