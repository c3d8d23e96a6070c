//! Aligned columns without borders, and lines of a watch under fixed ones.

use std::fmt;

use super::text::safe;

/// A table: a header, then rows.
#[derive(Debug)]
pub struct Table(comfy_table::Table);

impl Table {
    /// A table with these columns.
    pub fn new(columns: &[&'static str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.force_no_tty();
        table.set_header(columns.iter().copied());
        for column in table.column_iter_mut() {
            column.set_padding((0, GAP));
        }
        Self(table)
    }

    /// Adds a row; cells are escaped here.
    pub fn row(&mut self, cells: Vec<String>) {
        self.0.add_row(cells.iter().map(|cell| safe(cell).into_owned()));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.0.lines() {
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `Field:   value` lines, values aligned. One without a name goes on with the field above.
pub(super) fn fields(fields: &[(&'static str, String)]) -> String {
    let width = fields
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or_default()
        + 1;
    fields
        .iter()
        .map(|(name, value)| {
            let colon = if name.is_empty() { "" } else { ":" };
            format!("{:width$}  {}\n", format!("{name}{colon}"), safe(value))
                .trim_end()
                .to_owned()
                + "\n"
        })
        .collect()
}

/// One line of a watch. A cell wider than its column pushes the rest to the right.
pub(super) fn stream_line(columns: &[(&'static str, usize)], cells: &[String]) -> String {
    let mut line = String::new();
    for (index, cell) in cells.iter().enumerate() {
        let width = columns.get(index).map_or(0, |(_, width)| *width);
        line.push_str(&format!("{:width$}", safe(cell)));
        line.push_str("   ");
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
    line
}

const GAP: u16 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_without_borders_or_trailing_spaces() {
        let mut table = Table::new(&["ID", "VM", "ASKS"]);
        table.row(vec!["p1".into(), "web".into(), "tcp 10.0.0.1:80".into()]);
        table.row(vec!["p12345".into(), "a\u{202e}b".into(), String::new()]);

        assert_eq!(
            table.to_string(),
            "ID       VM           ASKS\n\
             p1       web          tcp 10.0.0.1:80\n\
             p12345   a\\u{202e}b\n"
        );
    }

    #[test]
    fn fields_are_aligned() {
        let text = fields(&[
            ("Id", "p1".into()),
            ("Asked", "3m".into()),
            ("", "ago".into()),
            ("Names", String::new()),
        ]);

        assert_eq!(text, "Id:     p1\nAsked:  3m\n        ago\nNames:\n");
    }

    #[test]
    fn lines_of_a_watch_keep_their_columns() {
        let columns = [("KIND", 6), ("VM", 4), ("TEXT", 0)];

        assert_eq!(
            stream_line(&columns, &["flow".into(), "web".into(), "opened".into()]),
            "flow     web    opened\n"
        );
    }
}
