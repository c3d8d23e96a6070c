use std::collections::BTreeMap;
use std::time::Duration;

use vnet_proto::model::MissId;

use super::*;

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

fn grant(id: &str, lifetime: Lifetime) -> Grant {
    let target = "tcp 1.2.3.4:443".parse().unwrap();
    let (allow, all) = (GrantAction::Allow, VmSelector::all());
    Grant::new(
        GrantId(id.into()),
        allow,
        target,
        all,
        lifetime,
        Budget::default(),
        "ann".into(),
        at(0),
    )
}

#[test]
fn a_grant_ends_at_its_time_and_not_before() {
    let mut grants = Grants::default();
    grants
        .insert(grant("a", Lifetime::For(Duration::from_secs(60))))
        .unwrap();
    grants.insert(grant("b", Lifetime::Forever)).unwrap();
    assert_eq!(grants.next_expiry(), Some(at(60)));
    assert!(grants.expire(at(59)).is_empty());
    let generation = grants.generation();
    assert_eq!(grants.expire(at(60))[0].id, GrantId("a".into()));
    assert!(grants.generation() > generation);
    assert_eq!((grants.len(), grants.next_expiry()), (1, None));
    assert!(Lifetime::For(Duration::MAX).expires_at(at(0)).is_none());
}

#[test]
fn once_is_one_flow_and_the_lookups_before_it_and_void_after_a_minute() {
    let mut grants = Grants::default();
    grants.insert(grant("a", Lifetime::Once)).unwrap();
    let id = GrantId("a".into());
    assert!(grants.record_use(&id, Use::Lookup, at(1)).is_none());
    assert!(grants.record_use(&id, Use::Lookup, at(1)).is_none());
    assert_eq!(grants.record_use(&id, Use::Flow, at(2)).unwrap().hits, 3);
    assert!(grants.is_empty() && grants.record_use(&id, Use::Flow, at(2)).is_none());
    grants.insert(grant("b", Lifetime::Once)).unwrap();
    assert_eq!(grants.expire(at(60)).len(), 1);
}

#[test]
fn until_the_vm_stops_is_that_attachment_and_no_other() {
    let mut grants = Grants::default();
    let instances = BTreeSet::from([vm("a").instance, vm("b").instance]);
    grants
        .insert(Grant {
            instances,
            ..grant("g", Lifetime::UntilVmStops)
        })
        .unwrap();
    let again = VmView {
        instance: VmInstance("boot2/a".into()),
        ..vm("a")
    };
    assert_eq!(grants.for_vm(&vm("a")).allow.len(), 1);
    assert_eq!(grants.for_vm(&again).allow.len(), 0);
    assert!(grants.vm_stopped(&vm("a").instance).is_empty());
    assert_eq!(grants.for_vm(&vm("a")).allow.len(), 0);
    assert_eq!(grants.for_vm(&vm("b")).allow.len(), 1);
    assert_eq!(grants.vm_stopped(&vm("b").instance).len(), 1);
}

fn budgeted(budget: Budget) -> (Grants, GrantId) {
    let mut grants = Grants::default();
    let made = Grant {
        budget,
        ..grant("abcd", Lifetime::Forever)
    };
    grants.insert(made).unwrap();
    (grants, GrantId("abcd".into()))
}

fn connections(connections: u64) -> Budget {
    Budget {
        connections,
        ..Budget::default()
    }
}

#[test]
fn bytes_that_are_used_up_end_their_grant_whoever_used_them() {
    let limit = Budget {
        bytes_up: 100,
        ..Budget::default()
    };
    let (mut grants, id) = budgeted(limit);
    let used = |bytes_up, bytes_down| Budget {
        connections: 1,
        bytes_up,
        bytes_down,
    };
    let tell = |grants: &mut Grants, name: &str, used| grants.record_spending(&id, vm(name).instance, used);
    assert_eq!(tell(&mut grants, "a", used(60, 1 << 40)), Spending::Counted);
    assert_eq!(tell(&mut grants, "a", used(60, 1 << 40)), Spending::Nothing);
    assert_eq!(
        grants.allowance(&id, &vm("b").instance).unwrap().left.bytes_up,
        40
    );
    let generation = grants.generation();
    assert!(matches!(tell(&mut grants, "b", used(40, 0)), Spending::UsedUp(_)));
    assert!(grants.is_empty() && grants.generation() > generation);
    let told: Vec<VmInstance> = [vm("a"), vm("b")].into_iter().map(|v| v.instance).collect();
    assert_eq!(grants.take_closed(), [(id.clone(), told)]);
    assert_eq!(tell(&mut grants, "b", used(41, 0)), Spending::Unknown);
    assert!(grant("x", Lifetime::Forever).budget_left().is_none());
}

#[test]
fn a_grant_without_connections_lets_no_flow_through_until_one_is_given_back() {
    let (mut grants, id) = budgeted(connections(2));
    let reaches = |grants: &Grants| !grants.for_vm(&vm("a")).allow.is_empty();
    for n in 1..=2 {
        assert!(reaches(&grants));
        assert!(grants.reserve(&id, (7, MissId(n)), at(0)));
    }
    assert!(!reaches(&grants) && grants.is_closed(&id));
    assert!(grants.out_of_connections().is_empty(), "none has opened yet");
    // Asked again under the same id, it is the same connection.
    assert!(grants.reserve(&id, (7, MissId(2)), at(1)));
    grants.release((7, MissId(1)));
    assert!(reaches(&grants), "its guest gave up");
    assert!(grants.reserve(&id, (7, MissId(3)), at(1)));

    assert_eq!(
        grants.record_spending(&id, vm("a").instance, connections(1)),
        Spending::Counted
    );
    grants.release((7, MissId(2)));
    let last = grants.record_spending(&id, vm("a").instance, connections(2));
    assert!(matches!(last, Spending::LastConnection(_)));
    assert!(grants.out_of_connections().is_empty(), "one may be on its way");
    grants.release((7, MissId(3)));
    assert_eq!(grants.out_of_connections(), std::slice::from_ref(&id));
    assert!(
        !reaches(&grants) && grants.get(&id).is_some(),
        "it can still be revoked"
    );
}

#[test]
fn what_is_set_aside_is_bounded_in_number_and_time() {
    let (mut grants, id) = budgeted(connections(u64::MAX));
    for n in 0..RESERVATIONS_MAX as u64 {
        assert!(grants.reserve(&id, (7, MissId(n)), at(0)));
    }
    assert!(!grants.reserve(&id, (7, MissId(u64::MAX)), at(0)));
    grants.expire_reservations(at(59));
    assert!(grants.account(&id).unwrap().has_reserved());
    grants.expire_reservations(at(60));
    assert!(!grants.account(&id).unwrap().has_reserved());
    assert!(grants.reserve(&id, (7, MissId(u64::MAX)), at(60)));
    grants.remove(&id);
    assert!(grants.reservations.is_empty());
}

#[test]
fn grants_are_capped_and_ids_are_unique() {
    let mut grants = Grants::default();
    for n in 0..GRANTS_MAX {
        grants
            .insert(grant(&format!("gran{n}"), Lifetime::Forever))
            .unwrap();
    }
    assert_eq!(
        grants.insert(grant("more", Lifetime::Forever)),
        Err(GrantError::Full)
    );
    let taken = GrantId("gran0".into());
    assert_eq!(
        grants.insert(grant("gran0", Lifetime::Forever)),
        Err(GrantError::Exists(taken))
    );
    assert!(matches!(
        grants.find("gran"),
        Err(GrantError::Ambiguous {
            count: GRANTS_MAX,
            ..
        })
    ));
    assert_eq!(grants.find("gran0").unwrap().id.0, "gran0");
    assert_eq!(grants.find("gran65535").unwrap().id.0, "gran65535");
    assert!(matches!(grants.find("grand"), Err(GrantError::NotFound(_))));
}

#[test]
fn an_id_may_be_cut_to_four_characters_and_no_fewer() {
    let mut grants = Grants::default();
    grants.insert(grant("abcdefgh", Lifetime::Forever)).unwrap();
    assert_eq!(grants.find("abcd").unwrap().id.0, "abcdefgh");
    for short in ["", "a", "abc"] {
        assert_eq!(grants.find(short), Err(GrantError::Short(short.to_owned())));
    }
}
