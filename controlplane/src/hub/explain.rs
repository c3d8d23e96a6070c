//! What would be decided of a name or address, and why, without anybody asking for it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use vnet_proto::model::{
    FlowKey, FlowSubject, Guard, GuardSet, LookupSubject, NamePattern, Protocol, Subject, Target,
};
use vnet_proto::v1;

use super::decide::{context, decide_for};
use super::{Hub, State};
use crate::convert;
use crate::fleet::{Dataplane, Vm, no_vm};
use crate::policy::decide_forward;
use crate::refusal::Refusal;

impl Hub {
    /// Says what would be decided.
    ///
    /// # Errors
    /// [`Refusal`] if the VM or the target is not one.
    pub fn explain(&self, vm: &str, target: &Target) -> Result<v1::ExplainResponse, Refusal> {
        self.read(|state, _| {
            let name = state.only_vm(vm)?;
            state.refresh_grants(&name);
            state.explain(&name, target)
        })
    }
}

impl State {
    fn explain(&self, name: &str, target: &Target) -> Result<v1::ExplainResponse, Refusal> {
        let vm = self.fleet.vm(name)?;
        let dataplane = self.fleet.dataplanes.get(&vm.dataplane);
        let dataplane = dataplane.ok_or_else(|| no_vm(name))?;
        if let Target::Forward(forward) = target {
            let context = context(vm, &dataplane.guarded, None);
            let (protocol, listen) = (forward.protocol(), forward.listen());
            let decision = decide_forward(&context, protocol, listen, forward.guest_port());
            return Ok(v1::ExplainResponse {
                action: convert::action(decision.outcome).into(),
                reason: Some((&decision.reason).into()),
                policy: vm.effective.policy_name().to_owned(),
                revision: vm.effective.revision(),
                remedy: decision.remedy,
                r#match: target.to_string(),
                ..Default::default()
            });
        }
        let (subject, peer) = self.subject_of(vm, dataplane, target)?;
        let decision = decide_for(vm, &dataplane.guarded, peer, &subject);
        let (names, guards) = match &subject {
            Subject::Flow(flow) => (flow.names.iter().map(ToString::to_string).collect(), flow.guards),
            Subject::Lookup(_) => (Vec::new(), GuardSet::EMPTY),
        };
        Ok(v1::ExplainResponse {
            action: convert::action(decision.outcome).into(),
            reason: Some((&decision.reason).into()),
            policy: vm.effective.policy_name().to_owned(),
            revision: vm.effective.revision(),
            remedy: decision.remedy,
            names,
            guards: guards.iter().map(|g| v1::Guard::from(g).into()).collect(),
            r#match: decision.found.to_string(),
            peer_vm: peer.map(|peer| peer.view.name.clone()).unwrap_or_default(),
        })
    }

    /// A VM's lookup of a name or connection to an address, and the other guest that it would be for.
    fn subject_of<'a>(
        &'a self,
        vm: &Vm,
        dataplane: &Dataplane,
        target: &Target,
    ) -> Result<(Subject, Option<&'a Vm>), Refusal> {
        Ok(match target {
            Target::Name {
                pattern: NamePattern::Exact(name),
                ..
            } => (Subject::Lookup(LookupSubject::new(name.clone(), 1)), None),
            Target::Name { .. } => {
                return Err(Refusal::field("target.name", "is a pattern (expected one name)"));
            }
            Target::Forward(_) => {
                return Err(Refusal::field("target.forward", "is neither a flow nor a lookup"));
            }
            Target::Address {
                protocol,
                prefix,
                ports,
            } => {
                if prefix.prefix_len() != prefix.max_prefix_len() {
                    return Err(Refusal::field(
                        "target.prefix",
                        format!("{prefix} is not one address"),
                    ));
                }
                let protocol = protocol.unwrap_or(Protocol::Tcp);
                let port = match (ports, protocol.has_ports()) {
                    (_, false) => 0,
                    (Some(ports), true) if ports.first() == ports.last() => ports.first(),
                    _ => return Err(Refusal::field("target.ports", "is not one port")),
                };
                let address = prefix.addr();
                let guest = if address.is_ipv4() {
                    IpAddr::from(Ipv4Addr::UNSPECIFIED)
                } else {
                    IpAddr::from(Ipv6Addr::UNSPECIFIED)
                };
                let text = address.to_string();
                let peer = self
                    .fleet
                    .vms
                    .values()
                    .find(|other| other.dataplane == vm.dataplane && other.addresses.contains(&text))
                    .filter(|other| other.view.name != vm.view.name);
                let names = vm.names_of(address);
                let dialled = dataplane.nat.get(&address).copied();
                let guards = match dialled {
                    Some(dialled) => dataplane
                        .guarded
                        .guards_of_moved(address, dialled, !names.is_empty()),
                    None => dataplane.guarded.guards_of(address, !names.is_empty()),
                };
                let dialled = dialled.unwrap_or(address);
                let flow = FlowSubject {
                    key: FlowKey {
                        protocol,
                        guest: SocketAddr::new(guest, 0),
                        peer: SocketAddr::new(address, port),
                    },
                    dialled,
                    names,
                    guards,
                    peer_vm: guards
                        .contains(Guard::Guest)
                        .then(|| peer.map(|p| p.handle))
                        .flatten(),
                };
                (Subject::Flow(flow), peer)
            }
        })
    }
}
