mod apart;
mod claims;
mod closed;
mod confirm;
mod forwards;
mod grants;
mod guests;
mod history;
mod host;
mod names;
mod networks;
mod policies;
mod questions;
mod reach;
mod returns;
mod sessions;
mod settings;
mod told;
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
const LISTED: &str = "version: 1\nsets:\n  web: {file: lists/web.txt}\nrules:\n  - {action: allow, cidrs: \"@web\", ports: [443]}\n";

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
