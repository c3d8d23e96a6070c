//! What a policy lets people answer: `approvals.maxLifetime` and `approvals.maxScope`.
//!
//! They bound a yes when it is given, whether it answers a request or comes by itself. A no may be as long and
//! as wide as anybody likes, and what was granted before a policy said less stays until it is revoked.

use vnet_proto::model::{NamePattern, Target};

use super::State;
use crate::grant::{Grant, GrantAction, Lifetime};
use crate::policy::{LongestLifetime, WidestScope};
use crate::refusal::Refusal;

impl State {
    /// The lifetime of an answer that says none: until the VM stops, or the longest that its policy allows.
    pub(super) fn usual_lifetime(&self, vm: &str, action: GrantAction) -> Lifetime {
        let vm = self.fleet.vms.get(vm).filter(|_| action == GrantAction::Allow);
        match vm.and_then(|vm| vm.effective.settings().max_lifetime) {
            Some(LongestLifetime::For(time)) => Lifetime::For(time),
            _ => Lifetime::UntilVmStops,
        }
    }

    /// Refuses a yes that holds longer, or covers more, than the policy of a VM that it reaches allows.
    pub(super) fn check_bounds(&self, grant: &Grant) -> Result<(), Refusal> {
        if grant.action != GrantAction::Allow {
            return Ok(());
        }
        let reached = self.fleet.vms.values().filter(|vm| grant.reaches(&vm.view));
        for vm in reached {
            let said = vm.effective.settings();
            let (policy, name) = (vm.effective.policy_name(), &vm.view.name);
            if let Some(most) = said.max_lifetime.filter(|most| is_longer(grant.lifetime, *most)) {
                return Err(refusal(format!(
                    "approvals.maxLifetime of policy {policy} is {most} for VM {name}, and this would hold {}; \
                     choose a shorter lifetime, as --for or --once",
                    in_words(grant.lifetime)
                )));
            }
            if let Some(most) = said.max_scope.filter(|most| width(&grant.target) > *most) {
                return Err(refusal(format!(
                    "approvals.maxScope of policy {policy} is {most} for VM {name}, and {} covers more; choose a \
                     narrower --scope or target",
                    grant.target
                )));
            }
        }
        Ok(())
    }
}

fn refusal(text: String) -> Refusal {
    Refusal::Precondition {
        reason: "BEYOND_POLICY",
        text,
    }
}

fn is_longer(lifetime: Lifetime, most: LongestLifetime) -> bool {
    match (lifetime, most) {
        (_, LongestLifetime::Forever) | (Lifetime::Once, _) => false,
        (Lifetime::Forever, _) => true,
        (Lifetime::UntilVmStops | Lifetime::For(_), LongestLifetime::UntilVmStops) => false,
        (Lifetime::UntilVmStops, LongestLifetime::For(_)) => true,
        (Lifetime::For(time), LongestLifetime::For(most)) => time > most,
    }
}

fn in_words(lifetime: Lifetime) -> String {
    match lifetime {
        Lifetime::Once => "once".to_owned(),
        Lifetime::For(time) => format!("for {}", humantime::format_duration(time)),
        Lifetime::UntilVmStops => "until the VM stops".to_owned(),
        Lifetime::Forever => "for ever".to_owned(),
    }
}

/// How much a target covers.
fn width(target: &Target) -> WidestScope {
    match target {
        Target::Address {
            protocol,
            prefix,
            ports,
        } => {
            if prefix.prefix_len() != prefix.max_prefix_len() {
                return WidestScope::Any;
            }
            // What has no ports is one thing by itself.
            let one = match (protocol, ports) {
                (_, Some(ports)) => ports.first() == ports.last(),
                (Some(protocol), None) => !protocol.has_ports(),
                (None, None) => false,
            };
            if one { WidestScope::Port } else { WidestScope::Host }
        }
        Target::Forward(_) => WidestScope::Port,
        // Below a public suffix (`*.com`, `*.github.io`) are everybody's names, not one owner's.
        Target::Name {
            pattern: NamePattern::Subdomains(parent),
            ..
        } => match psl::domain_str(parent.as_str()) {
            Some(_) => WidestScope::Subdomains,
            None => WidestScope::Any,
        },
        Target::Name {
            pattern: NamePattern::Exact(_),
            ports,
            lookup_only,
        } => {
            let one = ports.is_some_and(|ports| ports.first() == ports.last());
            if one || *lookup_only {
                WidestScope::Port
            } else {
                WidestScope::Host
            }
        }
    }
}
