//! Which policy a VM is under, where stored ones cannot be read or several claim it.

use super::*;

const OPEN: &str = "version: 1\ndefaultAction: allow\n";
const KNOWN: &str = "version: 1\nappliesTo: {name: known}\ndefaultAction: allow\n";
/// As a version might have taken it that knows more.
const FOREIGN: &str = "version: 99\nappliesTo: {name: lab}\n";

fn stored(name: &str, revision: u64, document: &str) -> v1::Policy {
    v1::Policy {
        name: name.to_owned(),
        revision,
        document: document.to_owned(),
        ..Default::default()
    }
}

/// A hub that finds these policies in its store.
fn found(dir: &TempDir, policies: &[v1::Policy]) -> Rig {
    let location = Location::Sqlite(dir.path().join("s.db"));
    let mut store = crate::store::open(&location).unwrap();
    let writes: Vec<Write> = policies.iter().cloned().map(Write::PutPolicy).collect();
    store.apply(&writes).unwrap();
    drop(store);
    Rig::start(&location, false)
}

fn apply(rig: &Rig, name: &str, document: &str) {
    let candidate = Candidate {
        name,
        document,
        ..listed(&[])
    };
    rig.hub.apply_policy(candidate).unwrap();
}

fn explained(rig: &Rig, vm: &str) -> v1::ExplainResponse {
    rig.hub
        .explain(vm, &"tcp 192.0.2.7:443".parse().unwrap())
        .unwrap()
}

fn mode(rig: &Rig, vm: &str) -> v1::Mode {
    rig.hub.vm(vm).unwrap().mode()
}

#[test]
fn a_policy_that_cannot_be_read_blocks_whom_no_other_claims() {
    let dir = TempDir::new();
    let policies = [
        stored("default", 1, OPEN),
        stored("known", 1, KNOWN),
        stored("lab", 3, FOREIGN),
    ];
    let rig = found(&dir, &policies);
    let mut known = rig.dataplane_with(hello(1, vec![vm_up(1, "known")]));
    let own = v1::VmUp {
        own_policy: Some(v1::OwnPolicy {
            document: OPEN.to_owned(),
            ..Default::default()
        }),
        ..vm_up(1, "own")
    };
    let mut own = rig.dataplane_with(hello(2, vec![own]));
    let mut lab = rig.dataplane_with(hello(3, vec![vm_up(1, "lab")]));
    assert_eq!(known.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(own.verdict(flow(WEB, &[])).action, ALLOW);
    let denied = lab.verdict(flow(WEB, &[]));
    assert_eq!(denied.action, DENY);
    let told = denied.reason.unwrap().text;
    assert!(
        told.starts_with("policy lab (revision 3) cannot be read"),
        "{told}"
    );
    assert_eq!(mode(&rig, "lab"), v1::Mode::Block);
    let why = explained(&rig, "lab");
    assert_eq!(
        why.reason.unwrap().text,
        "policy lab (revision 3) cannot be read by this version, and may be for lab: until it is applied anew, \
         mode block denies everything that lab initiates"
    );
    assert!(
        why.remedy.starts_with("vnetctl policy apply FILE --name lab "),
        "{}",
        why.remedy
    );

    // What was decided meanwhile is void, whether the VM turns out to be claimed or not.
    apply(
        &rig,
        "lab",
        "version: 1\nappliesTo: {name: lab}\ndefaultAction: allow\n",
    );
    assert!(lab.told().iter().any(|t| matches!(t, Told::Revoke(_))));
    assert_eq!(lab.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(rig.hub.vm("lab").unwrap().policy, "lab");
}

#[test]
fn a_vm_that_an_unreadable_policy_turns_out_not_to_claim_is_open_again() {
    let dir = TempDir::new();
    let rig = found(&dir, &[stored("lab", 1, FOREIGN)]);
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
    apply(&rig, "lab", "version: 1\nappliesTo: {name: lab}\n");
    assert!(
        dp.told().iter().any(|t| matches!(t, Told::Revoke(_))),
        "its cached denial is void"
    );
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);
    assert_eq!(mode(&rig, "web"), v1::Mode::Open);
}

#[test]
fn a_policy_that_is_withdrawn_is_nobodys_and_a_mode_that_is_set_stands() {
    let dir = TempDir::new();
    let withdrawn = v1::Policy {
        withdrawn: true,
        ..stored("gone", 2, "")
    };
    let rig = found(&dir, &[withdrawn]);
    let mut dp = rig.dataplane("web");
    assert_eq!(dp.verdict(flow(WEB, &[])).action, ALLOW);

    let dir = TempDir::new();
    let many: Vec<v1::Policy> = (1..=5).map(|n| stored(&format!("p{n}"), n, FOREIGN)).collect();
    let rig = found(&dir, &many);
    let mut dp = rig.dataplane("web");
    let why = explained(&rig, "web").reason.unwrap().text;
    assert!(
        why.starts_with(
            "policies p1 (revision 1), p2 (revision 2), p3 (revision 3) and 2 more cannot be read"
        ),
        "{why}"
    );
    rig.hub.update_vm(set_mode("web", Mode::Ask)).unwrap();
    dp.told();
    dp.held(flow(WEB, &[]));
    rig.hub.update_vm(set_mode("web", Mode::Block)).unwrap();
    assert_eq!(
        explained(&rig, "web").reason.unwrap().text,
        "mode block denies everything that web initiates"
    );
}

#[test]
fn two_policies_that_claim_one_vm_are_named() {
    let rig = Rig::open();
    let claims = "version: 1\nappliesTo: {labels: {team: net}}\ndefaultAction: allow\n";
    apply(&rig, "a", claims);
    apply(&rig, "b", claims);
    let both = v1::VmUp {
        labels: [("team".to_owned(), "net".to_owned())].into(),
        ..vm_up(1, "web")
    };
    let mut dp = rig.dataplane_with(hello(1, vec![both]));
    assert_eq!(dp.verdict(flow(WEB, &[])).action, DENY);
    let why = explained(&rig, "web");
    assert_eq!(
        why.reason.unwrap().text,
        "policies a, b claim web: until all but one of them are narrowed, mode block denies everything that web \
         initiates"
    );
    assert!(why.remedy.contains("appliesTo"), "{}", why.remedy);
}
