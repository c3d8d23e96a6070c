//! `grants list|revoke`: the answers that hold now.

use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use crate::client::{PAGE_SIZE, pages, unary};
use crate::failure::Failure;
use crate::output::{Row, text, words};

/// Verbs of `grants`.
#[derive(Debug, Subcommand)]
pub enum GrantsCommand {
    /// List the grants in force, newest first
    #[command(after_help = "Examples:\n  vnetctl grants list\n  vnetctl grants list --vm web -o yaml")]
    List(ListArgs),
    /// End grants, and cut the live flows that they alone allowed
    #[command(
        after_help = "Examples:\n  vnetctl grants revoke \"$(vnetctl grants list -o json | jq -r '.[0].id')\""
    )]
    Revoke(RevokeArgs),
}

/// Arguments of `grants list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only those that apply to this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
}

/// Arguments of `grants revoke`.
#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// Ids, or their beginnings of at least four characters
    #[arg(value_name = "ID", required = true)]
    pub ids: Vec<String>,
}

impl GrantsCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let client = context.connection.open().await?;
        match self {
            Self::List(ListArgs { vm }) => {
                let grants = pages(|page_token| {
                    let mut service = client.grants();
                    let vm = vm.clone().unwrap_or_default();
                    let request = v1::ListGrantsRequest {
                        vm,
                        page_size: PAGE_SIZE,
                        page_token,
                        ..Default::default()
                    };
                    async move {
                        let page = service.list_grants(unary(request)).await?.into_inner();
                        Ok((page.grants, page.next_page_token))
                    }
                })
                .await?;
                context.output.list(&grants)
            }
            Self::Revoke(RevokeArgs { ids }) => {
                super::each(ids, async |id| {
                    let request = v1::RevokeGrantRequest { id };
                    let answer = client.grants().revoke_grant(unary(request)).await?.into_inner();
                    context.output.done("vnet.v1.RevokeGrantResponse", &answer, || {
                        let grant = answer.grant.clone().unwrap_or_default();
                        format!("revoked {}{}", sentence(&grant), words::cut(answer.cut.as_ref()))
                    })
                })
                .await
            }
        }
    }
}

impl Row for v1::Grant {
    const NAME: &'static str = "vnet.v1.Grant";
    const COLUMNS: &'static [&'static str] = &[
        "ID", "ACTION", "TARGET", "VMS", "LIFETIME", "ENDS IN", "BUDGET", "HITS", "AGE", "BY", "REASON",
    ];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        vec![
            self.id.clone(),
            words::action(self.action),
            words::target(self.target.as_ref()),
            words::selector(self.vms.as_ref()),
            words::lifetime(self.lifetime.as_ref()),
            text::remaining(now, self.expires_at.as_ref()),
            text::or_none(words::budget(
                self.budget.as_ref(),
                Some(&self.used.unwrap_or_default()),
            )),
            self.hits.to_string(),
            text::age(now, self.created_at.as_ref()),
            text::or_none(self.creator.as_str()),
            text::or_none(self.reason.as_str()),
        ]
    }
}

/// A grant in one line: `allow tcp 10.0.0.1:80 for web, until the VM stops (grant 01AB)`.
pub fn sentence(grant: &v1::Grant) -> String {
    let mut budget = words::budget(grant.budget.as_ref(), None);
    if !budget.is_empty() {
        budget = format!(", at most {budget}");
    }
    format!(
        "{} {} for {}, {}{budget} (grant {})",
        words::action(grant.action),
        words::target(grant.target.as_ref()),
        words::selector(grant.vms.as_ref()),
        words::lifetime(grant.lifetime.as_ref()),
        grant.id
    )
}
