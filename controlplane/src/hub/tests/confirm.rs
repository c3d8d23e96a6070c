//! Revisions that go by themselves unless they are confirmed.

use super::*;
use crate::hub::Candidate;

const SHUT: &str = "version: 1\n";
const OPEN: &str = "version: 1\ndefaultAction: allow\n";
const MINUTE: Duration = Duration::from_secs(60);

fn try_out(rig: &Rig, document: &str) -> Applied {
    let candidate = Candidate {
        name: "",
        document,
        source: "p.yaml",
        etag: "",
        actor: "tester",
        validate_only: false,
        lists: &[],
        confirm_within: Some(MINUTE),
    };
    rig.hub.apply_policy(candidate).unwrap()
}

fn in_force(rig: &Rig) -> v1::Policy {
    rig.hub.policy("").unwrap()
}

#[test]
fn an_unconfirmed_revision_goes_at_its_deadline_and_cuts_what_it_let_through() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    rig.apply(SHUT);
    let applied = try_out(&rig, OPEN).policy;
    assert_eq!((applied.revision, applied.falls_back_to), (2, 1));
    assert!(applied.confirm_until.is_some());
    dp.told();
    let opened = open_allowed(&mut dp, WEB);

    rig.pass(MINUTE - Duration::from_millis(1));
    assert_eq!(in_force(&rig).revision, 2);
    dp.told();
    rig.pass(Duration::from_millis(1));

    let back = in_force(&rig);
    assert_eq!((back.revision, back.document.as_str()), (3, SHUT));
    assert_eq!((back.applied_by.as_str(), back.confirm_until), ("vnet", None));
    assert_ne!(back.etag, applied.etag);
    assert_eq!(cuts(&dp.told()), [opened]);
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
}

#[test]
fn a_confirmed_revision_stays() {
    let rig = Rig::open();
    rig.apply(SHUT);
    try_out(&rig, OPEN);
    let another = rig.hub.confirm_policy("", 1, "tester").unwrap_err();
    assert!(matches!(another, Refusal::Changed(_)), "{another}");
    let (confirmed, _) = rig.hub.confirm_policy("", 2, "tester").unwrap();
    assert_eq!((confirmed.revision, confirmed.confirm_until), (2, None));
    rig.pass(MINUTE * 2);
    assert_eq!(in_force(&rig).revision, 2);
    let again = rig.hub.confirm_policy("", 0, "tester").unwrap_err();
    assert!(
        matches!(
            again,
            Refusal::Precondition {
                reason: "NOT_AWAITED",
                ..
            }
        ),
        "{again}"
    );
}

#[test]
fn a_confirmation_that_comes_too_late_is_refused_before_the_next_tick() {
    let rig = Rig::open();
    rig.apply(SHUT);
    try_out(&rig, OPEN);
    rig.clock.advance(MINUTE);
    let late = rig.hub.confirm_policy("", 0, "tester").unwrap_err();
    assert!(late.to_string().contains("revision 3 is in force"), "{late}");
    assert_eq!(in_force(&rig).document, SHUT);
}

#[test]
fn the_first_policy_is_withdrawn_and_the_network_is_what_it_was() {
    let rig = Rig::open();
    let mut dp = rig.dataplane("web");
    let applied = try_out(&rig, SHUT).policy;
    assert_eq!(applied.falls_back_to, 0);
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
    rig.pass(MINUTE);
    dp.told();
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    let vm = rig.hub.vm("web").unwrap();
    assert_eq!((vm.mode, vm.policy.as_str()), (v1::Mode::Open as i32, ""));
    let withdrawn = in_force(&rig);
    assert!(withdrawn.withdrawn && withdrawn.revision == 2, "{withdrawn:?}");
    assert_eq!(withdrawn.mode, v1::Mode::Open as i32);
    assert_eq!(rig.apply(SHUT).policy.revision, 3, "numbers are not used again");
}

#[test]
fn what_comes_back_is_the_last_that_awaited_nothing() {
    let rig = Rig::open();
    rig.apply(SHUT);
    try_out(&rig, OPEN);
    rig.pass(MINUTE / 2);
    let second = try_out(&rig, "version: 1\nmode: observe\n").policy;
    assert_eq!((second.revision, second.falls_back_to), (3, 1));
    rig.pass(MINUTE / 2);
    assert_eq!(
        in_force(&rig).revision,
        3,
        "the first one's deadline is nobody's any more"
    );
    rig.pass(MINUTE / 2);
    assert_eq!(
        (in_force(&rig).revision, in_force(&rig).document.as_str()),
        (4, SHUT)
    );
}

#[test]
fn a_plain_apply_takes_the_place_of_an_unconfirmed_revision_for_good() {
    let rig = Rig::open();
    rig.apply(SHUT);
    try_out(&rig, OPEN);
    rig.apply("version: 1\nmode: observe\n");
    rig.pass(MINUTE * 2);
    assert_eq!(in_force(&rig).revision, 3);
}

/// A hub on a file, as a controlplane that is killed and started again.
fn restarted(file: &std::path::Path, later: Duration) -> Rig {
    let rig = Rig::start(&Location::Sqlite(file.to_owned()), false);
    // Its clock begins with the machine's: what passed while nothing ran is driven.
    rig.clock.advance(later);
    rig
}

#[tokio::test]
async fn a_deadline_outlives_the_controlplane() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    for first in [true, false] {
        let file = if first {
            file.clone()
        } else {
            dir.path().join("none.db")
        };
        let rig = Rig::start(&Location::Sqlite(file.clone()), false);
        if first {
            rig.apply(SHUT);
        }
        try_out(&rig, OPEN).durable.wait().await.unwrap();
        drop(rig);

        let rig = restarted(&file, Duration::ZERO);
        let awaiting = in_force(&rig);
        assert!(
            awaiting.confirm_until.is_some() && awaiting.document == OPEN,
            "{awaiting:?}"
        );
        drop(rig);

        let rig = restarted(&file, MINUTE);
        rig.hub.tick();
        let back = in_force(&rig);
        assert_eq!(back.document, if first { SHUT } else { "" });
        assert_eq!(back.withdrawn, !first);
        let mut dp = rig.dataplane("web");
        assert_eq!(
            dp.verdict(flow(WEB, &[])).action,
            if first { DENY } else { ALLOW }
        );
        // The way back is saved as well.
        rig.hub
            .writer()
            .policy("default".to_owned(), back.revision)
            .await
            .unwrap()
            .unwrap();
        drop(dp);
        drop(rig);
        assert_eq!(
            in_force(&restarted(&file, Duration::ZERO)).revision,
            back.revision
        );
    }
}

#[tokio::test]
async fn a_revision_whose_time_ran_out_while_nothing_ran_is_gone_before_anybody_is_served() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let mut store = crate::store::open(&Location::Sqlite(file.clone())).unwrap();
    let policy = |revision, document: &str| v1::Policy {
        name: "default".to_owned(),
        revision,
        document: document.to_owned(),
        ..Default::default()
    };
    let unconfirmed = v1::Policy {
        confirm_until: Some((std::time::SystemTime::now() - Duration::from_secs(1)).into()),
        falls_back_to: 1,
        ..policy(2, OPEN)
    };
    let writes = [Write::PutPolicy(policy(1, SHUT)), Write::PutPolicy(unconfirmed)];
    store.apply(&writes).unwrap();
    drop(store);
    let rig = restarted(&file, Duration::ZERO);
    // Not one tick.
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
    assert_eq!(
        (in_force(&rig).revision, in_force(&rig).document.as_str()),
        (3, SHUT)
    );
}

#[tokio::test]
async fn a_confirmation_outlives_the_controlplane() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let rig = restarted(&file, Duration::ZERO);
    rig.apply(SHUT);
    try_out(&rig, OPEN);
    rig.hub
        .confirm_policy("", 0, "tester")
        .unwrap()
        .1
        .wait()
        .await
        .unwrap();
    drop(rig);
    let rig = restarted(&file, MINUTE * 2);
    rig.hub.tick();
    assert_eq!((in_force(&rig).revision, in_force(&rig).confirm_until), (2, None));
}

#[test]
fn a_fallback_that_is_missing_blocks() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let mut store = crate::store::open(&Location::Sqlite(file.clone())).unwrap();
    let unconfirmed = v1::Policy {
        name: "default".to_owned(),
        revision: 2,
        document: OPEN.to_owned(),
        confirm_until: Some(std::time::SystemTime::UNIX_EPOCH.into()),
        falls_back_to: 1,
        ..Default::default()
    };
    store.apply(&[Write::PutPolicy(unconfirmed)]).unwrap();
    drop(store);
    let rig = restarted(&file, Duration::ZERO);
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
    assert_eq!(rig.hub.vm("web").unwrap().mode, v1::Mode::Block as i32);
}

#[tokio::test]
async fn what_comes_back_has_its_lists() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let rig = restarted(&file, Duration::ZERO);
    let lists = [crate::lists::pack("lists/web.txt", b"192.0.2.0/24\n")];
    rig.hub.apply_policy(listed(&lists)).unwrap();
    try_out(&rig, SHUT).durable.wait().await.unwrap();
    drop(rig);
    let rig = restarted(&file, Duration::ZERO);
    rig.pass(MINUTE);
    let back = in_force(&rig);
    assert_eq!((back.revision, back.lists.len()), (3, 1), "{back:?}");
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    drop(dp);
    drop(rig);
    let rig = restarted(&file, Duration::ZERO);
    let mut dp = rig.dataplane("web");
    assert_eq!(
        dp.verdict(flow(WEB, &[])).action,
        ALLOW,
        "and after another start"
    );
}

#[tokio::test]
async fn what_comes_back_has_its_lists_after_more_trials_than_revisions_keep_theirs() {
    let dir = TempDir::new();
    let file = dir.path().join("s.db");
    let rig = restarted(&file, Duration::ZERO);
    let lists = [crate::lists::pack("lists/web.txt", b"192.0.2.0/24\n")];
    rig.hub.apply_policy(listed(&lists)).unwrap();
    let trials = crate::store::LISTED_REVISIONS_MAX + 4;
    for trial in 1..=trials {
        let applied = try_out(&rig, &format!("version: 1\n# trial {trial}\n"));
        assert_eq!(applied.policy.falls_back_to, 1);
        applied.durable.wait().await.unwrap();
    }
    drop(rig);
    let rig = restarted(&file, Duration::ZERO);
    rig.pass(MINUTE);
    let back = in_force(&rig);
    assert_eq!((back.revision, back.lists.len()), (trials + 2, 1), "{back:?}");
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    // Others are applied meanwhile, which let go of lists that nothing names.
    let other = Candidate {
        name: "other",
        ..listed(&[])
    };
    let other = Candidate {
        document: "version: 1\nappliesTo: {name: nobody}\n",
        ..other
    };
    rig.hub.apply_policy(other).unwrap().durable.wait().await.unwrap();
    drop(dp);
    drop(rig);
    let rig = restarted(&file, Duration::ZERO);
    let mut dp = rig.dataplane("web");
    assert_eq!(
        dp.verdict(flow(WEB, &[])).action,
        ALLOW,
        "and after another start"
    );
}

#[test]
fn times_to_confirm_in_have_limits() {
    let span = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    assert_eq!(confirm_within(None), Ok(None));
    assert_eq!(confirm_within(span(1)), Ok(Some(Duration::from_secs(1))));
    for bad in [0, -5, 86_401] {
        assert!(confirm_within(span(bad)).is_err(), "{bad}");
    }
}
