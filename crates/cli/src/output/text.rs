//! Text from elsewhere, made safe to show.

/// With every character visible that could move the cursor, hide text or turn its direction.
pub(crate) fn printable(text: &str) -> String {
    escape(text, false)
}

/// As [`printable`], but line ends stay.
pub(crate) fn printable_lines(text: &str) -> String {
    escape(text, true)
}

fn escape(text: &str, keep_lines: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' if keep_lines => out.push(c),
            c if c.is_control() || is_directional(c) => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// Whether it changes the direction of what follows (Unicode's bidirectional controls).
const fn is_directional(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_invisible_passes() {
        assert_eq!(printable("db \u{1b}[2J\r\n\u{202e}x é"), "db \\u{1b}[2J\\r\\n\\u{202e}x é");
        assert_eq!(printable_lines("a\nb\t"), "a\nb\\t");
    }
}
